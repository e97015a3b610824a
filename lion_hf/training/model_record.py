"""Whether a checkpoint holds the model that a run trains."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .settings import differences

# Fields that may differ between a run and its continuation: how the model computes what it does,
# what libraries note, and what `data_record` checks. Dropout is free too, like the learning rate.
FREE_FIELDS = {
    "architectures",
    "attention_form",
    "auto_map",
    "chunk_size",
    "dtype",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "label2id",
    "problem_type",
    "sparse_prediction",
    "transformers_version",
    "use_cache",
}

MOST_CLASSES = 5  # that an error lists


def check_model(checkpoint: Path, config: PreTrainedConfig | None, evaluated: bool = False) -> None:
    """Checks that a run continues with the model that it began with, or evaluates that one.

    Args:
        checkpoint: the folder to continue from, or with the weights to evaluate.
        config: that of the model; None for a model without one, which is not checked.
        evaluated: whether the classes must have the same names and numbers, too, and images may
            have another size, where no position embeddings depend on it.

    Raises:
        ValueError: if the checkpoint's configuration is another one, with both values.
    """
    if config is None or not (checkpoint / "config.json").is_file():
        return
    try:
        kind = PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type")
        found = type(config).from_pretrained(checkpoint)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint}/config.json cannot be read ({error}): remove {checkpoint.name}, and the"
            " run continues from the checkpoint before, or choose another output_dir"
        ) from error
    before, now = found.to_dict(), config.to_dict()
    any_size = evaluated and now.get("use_position_embeddings") is False
    free = {"image_size"} if any_size else set()
    named = [name for name in now if name in before and name not in free and _matters(name)]
    if kind is not None and kind != config.model_type:
        before, now = {"model_type": kind}, {"model_type": config.model_type}
        named = ["model_type"]
    changes = differences(
        *({name: _without_dropout(x[name]) for name in named} for x in (before, now))
    )
    if changes:
        raise ValueError(
            f"{checkpoint} holds another model: {', '.join(changes.values())}; give the settings of"
            " the run, or choose another output_dir"
        )

    classes = [list(x.id2label.values()) for x in (found, config)]
    if evaluated and classes[0] != classes[1]:
        shown = [f"{names[:MOST_CLASSES]} ({len(names)})" for names in classes]
        cure = f"name {checkpoint} itself as the model, which keeps its own"
        if config.model_type != "lion":  # no such model can be named
            cure = "evaluate it on data with its classes"
        raise ValueError(
            f"{checkpoint} was trained for the classes {shown[0]}, the data has {shown[1]}, in this"
            f" order: {cure}"
        )


def _without_dropout(value: Any) -> Any:
    """A field's value; from a mapping, such as the arguments of timm's models, dropout is taken."""
    if not isinstance(value, dict):
        return value
    return {name: x for name, x in value.items() if "drop" not in str(name)}


def _matters(name: str) -> bool:
    return name not in FREE_FIELDS and "drop" not in name and not name.startswith(("_", "output_"))
