"""Configurations and tokenizers of text models, or one line that says why there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..auto import has_words

# What transformers raises for models that are missing, broken or not known to it. RuntimeErrors are
# those of weights of another shape, and of methods that a tokenizer lacks.
MISSING = (
    *(OSError, ValueError, ImportError, LookupError, TypeError, AttributeError),
    *(RuntimeError, SafetensorError, UnpicklingError),
)


LONGEST = 400  # characters of an error that are shown


def read_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a folder or a name on the Hub.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except MISSING as error:
        raise ValueError(
            f"model {path}: expected a folder with config.json, or a name on the Hub and a network"
            f" ({in_one_line(error)})"
        ) from error


def read_tokenizer(
    name: str, other: str, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a name on the Hub.

    Args:
        name: folder or name.
        other: the options that take another tokenizer, for the error.
        trust_remote_code: whether code that comes with it may run.

    Raises:
        ValueError: if there is none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        found = has_words(tokenizer)
    except Exception as error:  # of tokenizers the bare one
        raise ValueError(
            f"{name} has no tokenizer that can be read ({in_one_line(error)}): {other} takes"
            " another"
        ) from error
    if not found:
        raise ValueError(f"{name} has no tokenizer: {other} takes another")
    return tokenizer


@contextmanager
def readable_weights(path: str) -> Iterator[None]:
    """Raises ValueError in one line where the weights of a model cannot be loaded."""
    try:
        yield
    except MISSING as error:
        raise ValueError(
            f"model {path}: its weights cannot be loaded: {in_one_line(error)}"
        ) from error


def load_model(kind: Any, path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model with the weights of a folder or a name on the Hub, and what transformers tells of it.

    Weights that the folder lacks are random. The model's attribute `missing_weights` names them, so
    that `lion_hf.training.run` does not evaluate it without training.

    Args:
        kind: the class that loads it, such as AutoModelForMaskedLM.
        path: folder or name.
        **options: of its `from_pretrained`.

    Raises:
        ValueError: if the weights cannot be loaded.
    """
    with readable_weights(path):
        model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    model.missing_weights = sorted(info["missing_keys"])
    return model, info


def random_model(model: Any) -> Any:
    """The same model; its `missing_weights`, as in `load_model`, are all that it has."""
    model.missing_weights = sorted(name for name, _ in model.named_parameters())
    return model


def in_one_line(error: BaseException) -> str:
    """The beginning of an error's text in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
