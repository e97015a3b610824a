"""Training: runs, the trainer with its checkpoints, settings, and several processes."""

from ..folders import write_json
from ..moved import names_that_left
from ..startup import is_command_line

if not is_command_line():  # whose `--help` does without torch
    from .callbacks import Curves
    from .run import run, save

__all__ = ["Curves", "run", "save", "write_json"]

__getattr__ = names_that_left(__name__)
