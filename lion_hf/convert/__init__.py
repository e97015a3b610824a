"""Checkpoints of the original LION code: safe reading, the table of names, the conversion."""

from ..moved import names_that_left
from ..startup import is_command_line
from .errors import ConversionError

if not is_command_line():  # whose `--help` does without torch
    from .conversion import Conversion, convert_checkpoint

__all__ = ["Conversion", "ConversionError", "convert_checkpoint"]

__getattr__ = names_that_left(__name__)
