"""LION, bidirectional linear attention, in Hugging Face transformers. Importing it registers LION with the Auto classes."""

from importlib import import_module
from importlib.util import find_spec

from .auto import AUTO_MODELS, register
from .modeling.configuration_lion import LionConfig
from .modeling.lion_ops import choose_form, explain, lion_attention
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

# Name -> module, imported on first use: Trainer costs seconds that loading a model need not pay, and
# `python -m lion_hf.convert` must find its module not yet imported.
LAZY = {
    "DataCollatorForPackedLanguageModeling": ".data",
    "LionTrainer": ".trainer",
    "convert_checkpoint": ".convert",
    "save_for_hub": ".hub",
}

__all__ = [
    "AUTO_MODELS",
    "LionConfig",
    "LionForImageClassification",
    "LionForMaskedImageModeling",
    "LionForMaskedLM",
    "LionForMultipleChoice",
    "LionForQuestionAnswering",
    "LionForSequenceClassification",
    "LionForTokenClassification",
    "LionModel",
    "LionPreTrainedModel",
    "choose_form",
    "explain",
    "lion_attention",
    "snake_orders",
    *LAZY,
]

register()
if find_spec("timm") is not None:  # timm.create_model("lion_..."); it costs a tenth of this import's time
    import_module(".timm_models", __name__)


def __dir__() -> list[str]:
    return [*globals(), *LAZY]


def __getattr__(name: str):
    if name in LAZY:
        return getattr(import_module(LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
