"""Tokenizer and model of `lion-hf mlm`: loaded, trained on the text, or made from a preset."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..auto import length_limit
from ..data.masking import vocabulary_size
from ..data.rows import is_empty
from ..folders import has_weights, write_json
from ..presets import find_preset
from ..training.settings import differences, parse_overrides
from .loading import load_model, random_model, read_config, read_tokenizer
from .mlm_settings import ModelSettings

logger = logging.getLogger(__name__)

DEFAULT_TOKENIZER = "google-bert/bert-base-uncased"
TOKENIZER_RECORD = "trained_tokenizer.json"  # what the tokenizer beside it was trained on
SPECIAL = ("mask_token", "pad_token", "cls_token", "sep_token")


def load_tokenizer(
    settings: ModelSettings,
    train: datasets.Dataset | None,
    column: str,
    folder: Path,
    write: bool,
    source: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The model's or another's tokenizer, or one trained on the text.

    Args:
        settings: which one.
        train: the text to train it on, if it is to be trained.
        column: the text's column.
        folder: the run's, where a continued run finds its trained tokenizer.
        write: whether this process may write to it.
        source: plain values that describe the text; None if the text is not read.

    Raises:
        ValueError: if there is no such tokenizer, it lacks a special token, or the one in the
            folder was trained on something else.
    """
    if not settings.train_tokenizer:
        name = settings.tokenizer
        if name is None:
            model = find_preset(settings.model)
            own = not Path(model).is_dir() or Path(model, "tokenizer_config.json").is_file()
            name = model if own else DEFAULT_TOKENIZER
        tokenizer = read_tokenizer(name, "--tokenizer FOLDER or --train_tokenizer")
        for token in SPECIAL:
            if getattr(tokenizer, token) is None:
                raise ValueError(
                    f"--tokenizer {name} has no {token}, which masked language modelling needs"
                )
        return tokenizer
    record = {"vocab_size": settings.vocab_size, **(source or {})}
    if (folder / "tokenizer.json").is_file():
        check_record(folder, record, whole=source is not None)
        return read_tokenizer(str(folder), "--tokenizer FOLDER")
    if not write:
        raise ValueError(
            f"--train_tokenizer: {folder} is not the first process's folder; pass --tokenizer"
            " FOLDER instead"
        )
    if train is None:
        raise ValueError(
            f"--train_tokenizer: no trained tokenizer in {folder}, and no training text"
        )
    return train_tokenizer(train, column, settings.vocab_size, folder, record)


def check_record(folder: Path, record: Mapping[str, Any], whole: bool = True) -> None:
    """Checks what the tokenizer in the folder was trained on.

    Args:
        folder: with the tokenizer.
        record: what it should be.
        whole: whether that is all that is known of it.

    Raises:
        ValueError: if it was trained on anything else.
    """
    try:
        before = json.loads((folder / TOKENIZER_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--train_tokenizer: {folder} has a tokenizer, but what it was trained on cannot be"
            f" read from {TOKENIZER_RECORD}: pass --tokenizer {folder} to use it, or choose another"
            " --output_dir"
        ) from error
    before = before if isinstance(before, dict) else {}
    if not whole:
        before = {name: value for name, value in before.items() if name in record}
    changes = "; ".join(differences(before, json.loads(json.dumps(record))).values())
    if changes:
        raise ValueError(
            f"--train_tokenizer: the tokenizer in {folder} was trained on something else"
            f" ({changes}): bring that back, pass --tokenizer {folder} to use it as it is, or"
            " choose another --output_dir"
        )


def train_tokenizer(
    train: datasets.Dataset, column: str, words: int, folder: Path, record: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """Trains a tokenizer with BERT's normalisation and splitting, and writes it to the folder."""
    logger.info("training a tokenizer of %d words", words)
    batches = (train[start : start + 1000][column] for start in range(0, len(train), 1000))
    texts = ([text for text in batch if not is_empty(text)] for batch in batches)
    tokenizer = BertTokenizer().train_new_from_iterator(
        texts, vocab_size=words, show_progress=False
    )
    partial = folder / ".tokenizer"
    tokenizer.save_pretrained(partial)
    write_json(partial / TOKENIZER_RECORD, dict(record))
    # last the file that is looked for
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "tokenizer.json"):
        file.replace(folder / file.name)
    partial.rmdir()
    return tokenizer


def build_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The model of the settings in float32, with weights if there are any and they are wanted.

    Raises:
        ValueError: if there is no such model, it has no such fields, or has fewer words than the
            tokenizer.
    """
    source = find_preset(settings.model)
    weights = not settings.from_scratch and has_weights(source)
    try:
        overrides = parse_overrides(settings.model_overrides, read_config(source))
    except ValueError as error:
        raise ValueError(f"--model_overrides: {error}") from error
    words = vocabulary_size(tokenizer)
    if not weights:
        fitting = {"vocab_size": words, "pad_token_id": tokenizer.pad_token_id}
        overrides = fitting | overrides
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **overrides)
    if words > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {words} words, {settings.model} only {config.vocab_size}: use its"
            " own tokenizer"
        )
    config.sparse_prediction = settings.sparse_prediction
    logger.info("weights: %s", source if weights else "random")
    if weights:
        options = {"config": config, "dtype": torch.float32, "trust_remote_code": False}
        return load_model(AutoModelForMaskedLM, source, **options)[0]
    if limit := length_limit(config):  # a borrowed tokenizer has that of the model it came with
        tokenizer.model_max_length = limit
    options = {"dtype": torch.float32, "trust_remote_code": False}
    return random_model(AutoModelForMaskedLM.from_config(config, **options))


def check_length(config: PreTrainedConfig, max_length: int) -> None:
    """Raises ValueError if the rows are longer than the model's position embeddings."""
    if not getattr(config, "use_position_embeddings", True):
        return
    longest = config.max_position_embeddings
    if max_length > longest:
        raise ValueError(
            f"--max_length {max_length}: the model has {longest} positions; add"
            f" max_position_embeddings={max_length} to --model_overrides (from scratch), or take"
            " shorter rows"
        )


def check_pieces(config: PreTrainedConfig, max_length: int, processes: int) -> None:
    """Raises ValueError if the processes' pieces of a row are too short for the convolutions."""
    shortest = max(getattr(config, "conv_reach", 0), 1)  # only LION has convolutions
    if processes > 1 and max_length // processes < shortest:
        raise ValueError(
            f"--sequence_parallel_size {processes} with --max_length {max_length}: expected rows of"
            f" at least {processes * shortest} tokens"
        )
