"""Training: a run from start to end, the trainer, its callbacks and checkpoints, settings, several processes."""

from ..folders import write_json
from .callbacks import Curves
from .run import run, save

__all__ = ["Curves", "run", "save", "write_json"]
