"""From a softmax model to LION: copying its weights, and teaching the copy by its source."""

from ..moved import names_that_left
from ..startup import is_command_line
from .families import HEADS, MODEL_TYPES
from .settings import Copying, Distillation

if not is_command_line():  # whose `--help` does without torch
    from .checkpoint import Linearization, linearize_checkpoint
    from .copying import linearize_model
    from .softmax_models import load_softmax_model

__all__ = [
    "HEADS",
    "MODEL_TYPES",
    "Copying",
    "Distillation",
    "Linearization",
    "linearize_checkpoint",
    "linearize_model",
    "load_softmax_model",
]

__getattr__ = names_that_left(__name__)
