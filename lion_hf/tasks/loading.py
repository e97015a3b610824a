"""Configurations and tokenizers of text models, or one line that says why there is none."""

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

MISSING = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RecursionError)


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
        words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    except MISSING as error:
        raise ValueError(
            f"{name} has no tokenizer that can be read ({in_one_line(error)}): {other} takes"
            " another"
        ) from error
    if not words:  # what transformers makes up where there is none
        raise ValueError(f"{name} has no tokenizer: {other} takes another")
    return tokenizer


def in_one_line(error: BaseException) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split()) or type(error).__name__
