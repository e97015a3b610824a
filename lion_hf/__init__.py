"""LION, bidirectional linear attention, in Hugging Face transformers.

Importing this package registers LION with the Auto classes of transformers, and with timm.
"""

from importlib import import_module

from . import moved, startup

__version__ = "0.1.0"

# Name -> module, imported on first use: Trainer costs seconds that loading a model need not pay.
LAZY = {
    "DataCollatorForPackedLanguageModeling": ".data.packing",
    "LionTrainer": ".training.trainer",
    "convert_checkpoint": ".convert.conversion",
    "linearize_checkpoint": ".linearize.checkpoint",
    "linearize_model": ".linearize.copying",
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
    "portable_export",
    "snake_orders",
    *LAZY,
]

moved.install()
if not startup.is_command_line():
    from .auto import AUTO_MODELS
    from .modeling.configuration_lion import LionConfig
    from .modeling.lion_choice import choose_form, explain
    from .modeling.lion_ops import lion_attention
    from .modeling.lion_orders import snake_orders
    from .modeling.lion_portable import portable_export
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

    startup.register()


def __dir__() -> list[str]:
    return [*globals(), *LAZY]


def __getattr__(name: str):
    if name in LAZY:
        return getattr(import_module(LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
