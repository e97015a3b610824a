"""Checkpoints of the original LION code: safe reading, the table of names, the conversion."""

from ..moved import names_that_left
from .conversion import Conversion, convert_checkpoint
from .errors import ConversionError

__all__ = ["Conversion", "ConversionError", "convert_checkpoint"]

__getattr__ = names_that_left(__name__)
