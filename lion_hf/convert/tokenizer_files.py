"""Checks of a tokenizer's files before they are read, and of its words afterwards."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..auto import has_words
from ..data.masking import vocabulary_size
from ..modeling.configuration_lion import LionConfig
from .errors import ConversionError

MEBIBYTE = 2**20
MOST_TOKENIZER_BYTES = 100 * MEBIBYTE
MOST_SETTINGS_BYTES = 4 * MEBIBYTE
BYTES_PER_WORD = 300  # of a tokenizer's file; the published ones have 15 to 90

WORD_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "sentencepiece.model",
)
SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
)


def check_processor_files(folder: Path, words: int) -> None:
    """Raises ConversionError if a tokenizer or image processor is too large for its model.

    Args:
        folder: the folder with its files.
        words: number of words that the model knows, 0 for an image model.
    """
    most = min(MOST_TOKENIZER_BYTES, MEBIBYTE + BYTES_PER_WORD * words)
    limits = {
        **dict.fromkeys(WORD_FILES, most),
        **dict.fromkeys(SETTINGS_FILES, MOST_SETTINGS_BYTES),
    }
    for name, limit in limits.items():
        if (folder / name).is_file():
            check_size(folder / name, limit)


def check_size(file: Path, most: int) -> None:
    """Raises ConversionError if a file is larger than a number of bytes."""
    size = file.stat().st_size
    if size > most:
        raise ConversionError(f"{file} has {size} bytes: expected at most {most}")


def read_tokenizer(name: str, config: LionConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a name on the Hub.

    Raises:
        ConversionError: if there is none that can be read, or its files are too large.
    """
    check_processor_files(Path(name), config.vocab_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        found = has_words(tokenizer)
    except Exception as error:  # of transformers many kinds, of tokenizers the bare one
        raise ConversionError(
            f"--tokenizer (tokenizer) {name} has no tokenizer that can be read"
            f" ({type(error).__name__}: {error})"
        ) from error
    if not found:
        raise ConversionError(f"--tokenizer (tokenizer) {name} has no tokenizer")
    return tokenizer


def check_words(tokenizer: PreTrainedTokenizerBase, config: LionConfig) -> None:
    """Raises ConversionError if a tokenizer has words that the model has no embeddings for."""
    words = vocabulary_size(tokenizer)
    if words > config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {words} words, more than the model's {config.vocab_size}"
        )
