"""Checkpoints of the original LION code: reading them safely, the table of names, and the conversion."""

from .conversion import Conversion, convert_checkpoint
from .errors import ConversionError

__all__ = ["Conversion", "ConversionError", "convert_checkpoint"]
