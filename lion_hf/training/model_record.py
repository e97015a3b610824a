"""Whether a checkpoint holds the model that a run trains."""

from pathlib import Path

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


def check_model(checkpoint: Path, config: PreTrainedConfig | None) -> None:
    """Checks that a run continues with the model that it began with.

    Args:
        checkpoint: the folder to continue from.
        config: that of the model; None for a model without one, which is not checked.

    Raises:
        ValueError: if the checkpoint's configuration is another one, with both values.
    """
    if config is None or not (checkpoint / "config.json").is_file():
        return
    try:
        before = type(config).from_pretrained(checkpoint).to_dict()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint}/config.json cannot be read ({error}): remove {checkpoint.name}, and the"
            " run continues from the checkpoint before, or choose another output_dir"
        ) from error
    now = config.to_dict()
    named = [name for name in now if name in before and _matters(name)]
    changes = differences({x: before[x] for x in named}, {x: now[x] for x in named})
    if changes:
        raise ValueError(
            f"{checkpoint} holds another model: {', '.join(changes.values())}; give the settings of"
            " the run, or choose another output_dir"
        )


def _matters(name: str) -> bool:
    return name not in FREE_FIELDS and "drop" not in name and not name.startswith(("_", "output_"))
