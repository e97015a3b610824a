"""Pretrains LION as a masked language model: `lion-hf mlm`. Its use: mlm_settings.py."""

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from torch.utils.data import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed

from ..data.documents import Documents, find_files, read_dataset, read_files
from ..data.fingerprints import fingerprint
from ..data.masking import MaskTokens, pad_rows, vocabulary_size
from ..data.rows import (
    TOGETHER,
    documents_together,
    full_rows_of,
    make_rows_of,
    prepare_rows,
)
from ..data.samples import SeededDataset
from ..data.text_stream import TextStream
from ..status import stop
from ..training.checkpoints import find_checkpoint
from ..training.lock import run_lock
from ..training.run import log_to_terminal, run
from ..training.run_state import digest
from ..training.sequence_trainer import SequenceArguments, SequenceTrainer
from ..training.settings import parse_settings
from ..training.stream_trainer import StreamingTrainer
from .mlm_model import build_model, check_length, check_pieces, load_tokenizer
from .mlm_scores import count_and_guess, count_right, masked_metrics, write_guesses
from .mlm_settings import USAGE, DataSettings, ModelSettings, check_settings

logger = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """What `run` needs: the trainer, what describes its data, and rows to predict."""

    trainer: SequenceTrainer
    data: dict[str, Any]
    test: SeededDataset | None


def main(argv: list[str] | None = None, prog: str | None = None) -> dict[str, float]:
    """Runs the command line `argv`; returns the metrics."""
    model_settings, data, args = parse_settings(
        USAGE, ModelSettings, DataSettings, SequenceArguments, argv=argv, prog=prog
    )
    log_to_terminal(args)
    try:
        set_seed(args.seed)
        check_settings(model_settings, data, args)
        writes = args.do_train and model_settings.train_tokenizer  # before the run begins
        with run_lock(args) if writes else contextlib.nullcontext():
            return train_and_evaluate(model_settings, data, args)
    except ValueError as error:
        stop(f"lion-hf mlm: {error}")


def train_and_evaluate(
    model_settings: ModelSettings, data: DataSettings, args: SequenceArguments
) -> dict[str, float]:
    """Trains, evaluates and predicts as the settings say; returns the metrics.

    Raises:
        ValueError: for settings or data that do not work, before the first step where possible.
    """
    if args.do_train:
        find_checkpoint(args.output_dir, args.resume)
    trainer, record, test = prepare(model_settings, data, args)
    model, tokenizer = trainer.model, trainer.processing_class
    kind = " ".join(filter(None, (model.config.model_type, getattr(model.config, "mask_type", ""))))
    files = data.train_file or data.validation_file or data.test_file or []
    write = None
    if test is not None:
        predictions = Path(args.output_dir, "predictions.jsonl")
        write = functools.partial(write_guesses, predictions, test, tokenizer)
    metrics = run(
        trainer,
        title=f"{kind} as masked language model, {model.num_parameters() / 1e6:.1f} M parameters",
        metric="masked_accuracy",
        dataset=data.dataset or ", ".join(Path(file).name for file in files),
        settings=(model_settings, data),
        data=record,
        predict_dataset=test,
        write_predictions=write,
        finish=functools.partial(predict_all_words, args),
    )
    names = [
        name for name in ("masked_accuracy", "loss", "perplexity") if f"eval_{name}" in metrics
    ]
    shown = ", ".join(f"{name} {metrics[f'eval_{name}']:.4g}" for name in names)
    logger.info("%s in %s", shown or "done", args.output_dir)
    return metrics


def predict_all_words(args: SequenceArguments, _: dict[str, float]) -> None:
    """Lets the saved model compute the scores of all words again."""
    if args.should_save:
        config = AutoConfig.from_pretrained(args.output_dir)
        config.sparse_prediction = False
        config.save_pretrained(args.output_dir)


def prepare(model_settings: ModelSettings, data: DataSettings, args: SequenceArguments) -> Prepared:
    """Everything that can go wrong before the first step goes wrong here, with a ValueError."""
    parts = [*["train"] * args.do_train, "validation", *["test"] * args.do_predict]
    texts = {part: text for part in parts if (text := load_text(data, part)) is not None}
    # a tokenizer is trained and rows are prepared once; the other processes read them
    with args.main_process_first(local=False):
        tokenizer = load_tokenizer(
            model_settings,
            texts.get("train"),
            data.text_column,
            Path(args.output_dir),
            args.should_save,
            describe_text(data, "train", texts) if "train" in texts else None,
        )
        if data.whole_words and not tokenizer.is_fast:
            raise ValueError(
                "--whole_words needs a tokenizer that knows words: that one is written in Python"
            )
        model = build_model(model_settings, tokenizer)
        check_length(model.config, data.max_length)
        check_pieces(model.config, data.max_length, args.sequence_parallel_size)
        rows = {part: rows_of(texts[part], part, data, args, tokenizer) for part in texts}
    stream = data.streaming and args.do_train
    mask = MaskTokens(tokenizer, data.validation_mask_probability, data.whole_words)
    held_out = {
        part: SeededDataset(rows[part], mask, args.seed, vary=False)
        for part in ("validation", "test")
        if part in rows
    }
    trainer = (StreamingTrainer if stream else SequenceTrainer)(
        model,
        args,
        train_dataset=training_set(rows.get("train"), data, args, tokenizer),
        eval_dataset=held_out.get("validation"),
        data_collator=functools.partial(pad_rows, pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        compute_metrics=masked_metrics,
        preprocess_logits_for_metrics=count_and_guess if args.do_predict else count_right,
    )
    test = held_out.get("test", held_out.get("validation"))
    return Prepared(trainer, describe_data(data, texts, tokenizer), test)


def load_text(data: DataSettings, part: str) -> Documents | None:
    """The documents of "train", "validation" or "test"; None if there are none.

    Training text may be a stream. Of streamed data, as many documents are held out as rows.
    """
    streaming = data.streaming and part == "train"
    if data.dataset is None:
        files = getattr(data, f"{part}_file")
        try:
            return files and read_files(find_files(files), data.text_column, streaming)
        except ValueError as error:
            raise ValueError(f"--{part}_file: {error}") from error
    if part == "test":
        return None
    source = data.dataset, data.dataset_config, getattr(data, f"{part}_split"), data.text_column
    if part == "validation" and data.streaming:
        first = read_dataset(*source, streaming=True).take(data.validation_rows)
        return datasets.Dataset.from_list(list(first))
    return read_dataset(*source, streaming=streaming)


def row_maker(
    part: str, data: DataSettings, args: SequenceArguments, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[str]], list[dict]]:
    """Makes rows of documents. Rows that processes share are full ones."""
    shared = part == "train" and args.sequence_parallel_size > 1
    make = full_rows_of if shared else make_rows_of
    return functools.partial(make, tokenizer=tokenizer, kind=data.rows, max_length=data.max_length)


def rows_of(
    text: Documents,
    part: str,
    data: DataSettings,
    args: SequenceArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> Documents:
    """The rows of a part. A stream stays text, of which rows are made while it is read."""
    if isinstance(text, datasets.IterableDataset):
        return text
    column, make_rows = data.text_column, row_maker(part, data, args, tokenizer)
    try:
        together = TOGETHER
        if data.rows != "padded":
            together = documents_together(text, column, tokenizer, data.max_length)
        rows = prepare_rows(text, column, make_rows, data.preprocessing_workers, together)
    except ValueError as error:
        raise ValueError(f"{part} text: {error}") from error
    if part == "train":
        if not len(rows):
            raise ValueError(f"train text: too short for a row of --max_length {data.max_length}")
        logger.info("%d rows to train on", len(rows))
        return rows
    return rows.select(range(min(len(rows), data.validation_rows)))


def training_set(
    rows: Documents | None,
    data: DataSettings,
    args: SequenceArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset | None:
    """Masked rows to train on, from a table or from a stream."""
    if rows is None:
        return None
    mask = MaskTokens(tokenizer, data.mask_probability, data.whole_words)
    if not data.streaming:
        return SeededDataset(rows, mask, args.seed)
    logger.info("streaming from %d shards; empty documents are left out", rows.num_shards)
    return TextStream(
        rows,
        row_maker("train", data, args, tokenizer),
        mask,
        column=data.text_column,
        buffer_size=data.shuffle_buffer,
        seed=args.seed,
    )


def describe_text(data: DataSettings, part: str, texts: dict[str, Documents]) -> dict[str, Any]:
    """Plain values by which a part's text is known again: fingerprints of files, or names."""
    if data.dataset is None:
        found = fingerprint(find_files(getattr(data, f"{part}_file")))
    elif Path(data.dataset).is_dir():
        found = fingerprint([data.dataset])
    else:
        split = getattr(data, f"{part}_split")
        found = {"dataset": data.dataset, "configuration": data.dataset_config, "split": split}
    if isinstance(texts[part], datasets.Dataset):
        found["documents"] = len(texts[part])
    return found


def describe_data(
    data: DataSettings, texts: dict[str, Documents], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Plain values that must not change while a run is interrupted."""
    names = ("text_column", "rows", "max_length", "streaming", "whole_words")
    record: dict[str, Any] = {name: getattr(data, name) for name in names}
    if data.streaming:
        record["shuffle_buffer"] = data.shuffle_buffer
    record["words"] = vocabulary_size(tokenizer)
    record["vocabulary"] = digest(tokenizer.get_vocab())
    return record | {
        part: describe_text(data, part, texts) for part in ("train", "validation") if part in texts
    }
