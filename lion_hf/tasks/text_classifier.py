"""Loading a text model to fine-tune as a classifier, with all checks before the training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.masking import vocabulary_size
from ..folders import has_weights
from ..modeling.lion_choice import check_score_dropout
from ..presets import find_preset
from ..training.settings import parse_overrides
from .loading import read_config, read_tokenizer, readable_weights


def load_config(
    path: str,
    overrides: str | None,
    changes: Mapping[str, Any],
    max_length: int,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """A text model's configuration with changed settings.

    Args:
        path: folder or name on the Hub.
        overrides: settings to change, as `parse_overrides` reads them.
        changes: more of them, by the configuration's names.
        max_length: tokens of a row at most.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: if there is no such model, it is for images, has no such setting or does not
            allow the value, cannot train in the form chosen, or has too few positions.
    """
    path = find_preset(path)
    config = read_config(path, trust_remote_code)
    if getattr(config, "modality", "text") != "text":
        raise ValueError(f"model {path} is for images: expected a text model")
    for name, value in {**parse_overrides(overrides, config), **changes}.items():
        if not hasattr(config, name):
            raise ValueError(
                f"{name}={value!r}: {path} is a {config.model_type} model, which has no such "
                "setting"
            )
        setattr(config, name, value)
    if config.model_type == "lion":
        config.check()
        check_score_dropout(config)
    positions = getattr(config, "max_position_embeddings", None)
    if getattr(config, "use_position_embeddings", True) and positions and max_length > positions:
        raise ValueError(
            f"max_length={max_length}: expected at most the {positions} positions of {path}"
        )
    return config


def load_tokenizer(
    name: str, config: PreTrainedConfig, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer that fits a model.

    Raises:
        ValueError: if there is none, it has more words than the model, or no padding token.
    """
    tokenizer = read_tokenizer(name, "tokenizer_name", trust_remote_code)
    words = vocabulary_size(tokenizer)
    if words > config.vocab_size:
        raise ValueError(
            f"tokenizer of {name}: {words} words; expected at most the model's {config.vocab_size}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer of {name}: it has no padding token, which short rows of a batch need"
        )
    return tokenizer


def check_weights(path: str) -> None:
    """Raises ValueError if a folder has a configuration but no weights."""
    if not has_weights(path):
        raise ValueError(f"model {path} holds no weights: from_scratch starts from random ones")


def build_classifier(
    path: str,
    config: PreTrainedConfig,
    classes: Sequence[str],
    from_scratch: bool = False,
    trust_remote_code: bool = False,
    trained: bool = False,
) -> PreTrainedModel:
    """The model in float32 with a classifier for these classes; without classes, a regressor.

    Args:
        path: folder or name on the Hub. A classifier there for another number of classes is
            replaced.
        config: from `load_config`; its classes are set.
        classes: their names in the order of their numbers.
        from_scratch: whether all weights are random.
        trust_remote_code: whether code that comes with the model may run.
        trained: whether the classifier must be there, because it will not be trained.

    Raises:
        ValueError: if weights other than the classifier's have other shapes than the configuration
            asks for, or a trained classifier is missing.
    """
    names = tuple(classes) or ("target",)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = "single_label_classification" if classes else "regression"
    options = {"config": config, "trust_remote_code": trust_remote_code}
    if from_scratch:
        return AutoModelForSequenceClassification.from_config(**options)
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    with readable_weights(path):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, **options
        )
    for name, found, asked in sorted(info["mismatched_keys"]):
        # only the classifier is meant to differ, if it will be trained
        if trained or name.startswith(f"{model.base_model_prefix}."):
            raise ValueError(
                f"model {path}: {name} has shape {tuple(found)}, the configuration asks for"
                f" {tuple(asked)}"
            )
    if trained and info["missing_keys"]:
        raise ValueError(
            f"model {path} is not fine-tuned: it lacks {sorted(info['missing_keys'])[0]}. Train it"
            " first, or name a fine-tuned model or the output_dir of finished runs"
        )
    return model
