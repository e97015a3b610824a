"""From a softmax model to LION: copying its weights, and teaching the copy by its source."""

from .checkpoint import Linearization, linearize_checkpoint
from .copying import linearize_model
from .settings import Copying, Distillation
from .softmax_models import HEADS, MODEL_TYPES, load_softmax_model

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
