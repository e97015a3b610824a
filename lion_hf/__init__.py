"""LION, bidirectional linear attention, in Hugging Face transformers. Importing it registers LION with the Auto classes."""

from .auto import AUTO_MODELS, register
from .modeling.configuration_lion import LionConfig
from .modeling.lion_ops import choose_form, lion_attention
from .modeling.lion_scan import snake_orders
from .modeling.modeling_lion import (
    LionForImageClassification,
    LionForMaskedImageModeling,
    LionForMaskedLM,
    LionForMultipleChoice,
    LionForQuestionAnswering,
    LionForSequenceClassification,
    LionForTokenClassification,
    LionModel,
    LionPreTrainedModel,
)

__version__ = "0.1.0"

register()


def __getattr__(name: str):
    """Imports LionTrainer on first use: Trainer and datasets cost seconds that loading a model need not pay."""
    if name == "LionTrainer":
        from .trainer import LionTrainer

        return LionTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
