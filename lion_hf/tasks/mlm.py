"""Pretrains LION as a masked language model, from scratch or from a checkpoint.

    # the recipe of LION-S base on C4, streamed, on 8 GPUs (70,000 steps of 4,096 rows of 128 tokens):
    accelerate launch --config_file configs/accelerate/ddp.yaml -m lion_hf mlm \\
        --config mlm/lion-s-base --output_dir outputs/lion-s-base

    # your own text (one document a line; also JSON, CSV, parquet), a small model, a vocabulary of that text:
    lion-hf mlm --train_file train.txt --validation_file validation.txt --train_tokenizer --vocab_size 8192 \\
        --model lion-s-base --model_overrides hidden_size=256,num_hidden_layers=4,num_attention_heads=4 \\
        --rows packed --max_length 256 --max_steps 2000 --output_dir outputs/my-lion

Started again, it continues from the newest whole checkpoint. In the end the folder holds the model with a model card, curves
(PNG, CSV), the settings and the metrics: masked accuracy, loss and perplexity on the validation text.
"""

import dataclasses
import functools
import glob
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..auto import length_limit
from ..data.masking import MaskTokens, pad_rows
from ..data.packing import pack
from ..data.samples import SeededDataset
from ..data.text_stream import TextStream
from ..folders import has_weights
from ..presets import find_preset
from ..training.checkpoints import find_checkpoint
from ..training.run import run
from ..training.settings import parse_overrides, parse_settings
from ..training.stream_trainer import StreamingTrainer
from ..training.trainer import LionTrainer, LionTrainingArguments

logger = logging.getLogger(__name__)

LOADERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".gz": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


@dataclass
class ModelSettings:
    """What to train."""

    model: str = field(
        default="modern-lion-s-base",
        metadata={
            "help": "Preset, model folder or Hub name. With weights, training starts from them, unless --from_scratch."
        },
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Random weights even if there are others."}
    )
    model_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the configuration: name=value,name=value."}
    )
    sparse_prediction: bool = field(
        default=True,
        metadata={
            "help": "Compute scores of words for masked tokens only; the final model has all again."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer folder or Hub name; by default the model's own, else bert-base-uncased."
        },
    )
    train_tokenizer: bool = field(
        default=False,
        metadata={"help": "Train a lower-case WordPiece tokenizer on the training text."},
    )
    vocab_size: int = field(default=30522, metadata={"help": "Words of a trained tokenizer."})


@dataclass
class DataSettings:
    """What to train on."""

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text (a document a line), JSON, CSV or parquet files, or patterns such as data/*.txt."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "The same to evaluate on."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub, in place of files, such as allenai/c4."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Its configuration, such as en."}
    )
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split: str = field(
        default="validation", metadata={"help": "Its split to evaluate on."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read while training, instead of preparing all rows before."},
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Documents that a stream shuffles together."}
    )
    validation_rows: int = field(
        default=10_000, metadata={"help": "Rows to evaluate on, the first ones."}
    )
    rows: Literal["padded", "blocks", "packed"] = field(
        default="padded",
        metadata={
            "help": "padded: a document a row, long ones in several; blocks: documents one after the other, cut to full rows; "
            "packed: several documents a row, which do not see each other."
        },
    )
    max_length: int = field(default=128, metadata={"help": "Tokens a row, special ones included."})
    mask_probability: float = field(
        default=0.3, metadata={"help": "Share of tokens to predict in training."}
    )
    validation_mask_probability: float = field(
        default=0.15, metadata={"help": "The same in evaluation."}
    )
    whole_words: bool = field(default=False, metadata={"help": "Mask words with all their tokens."})
    preprocessing_workers: int | None = field(
        default=None, metadata={"help": "Processes that prepare the rows."}
    )

    def __post_init__(self):
        if (self.train_file is None) == (self.dataset is None):
            raise ValueError("expected either --train_file or --dataset")
        if self.max_length < 8:
            raise ValueError(f"max_length={self.max_length}: expected an integer of at least 8")
        for name in ("mask_probability", "validation_mask_probability"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number between 0 and 1")
        for name in ("shuffle_buffer", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 1")


def main(argv: list[str] | None = None, prog: str | None = None) -> dict[str, float]:
    model_settings, data, args = parse_settings(
        __doc__, ModelSettings, DataSettings, LionTrainingArguments, argv=argv, prog=prog
    )
    logging.basicConfig(
        level=logging.INFO if args.should_log else logging.ERROR, format="%(name)s: %(message)s"
    )
    set_seed(args.seed)
    if data.streaming and args.max_steps < 1:
        raise SystemExit(
            f"--max_steps {args.max_steps}: a stream has no end, so --streaming needs a number of steps"
        )
    try:
        find_checkpoint(args.output_dir, args.resume)
    except ValueError as error:
        raise SystemExit(f"--{error}") from error

    train: Any = load_text(data, "train")
    validation = load_text(data, "validation")
    with args.main_process_first(
        local=False
    ):  # a tokenizer is trained and rows are prepared once, others read them
        tokenizer = load_tokenizer(
            model_settings, train, data.text_column, Path(args.output_dir), args.should_save
        )
        model = build_model(model_settings, tokenizer)
        check_length(model.config, data.max_length)
        make_rows = functools.partial(
            make_rows_of, tokenizer=tokenizer, kind=data.rows, max_length=data.max_length
        )
        if validation is not None:
            validation = prepare_rows(validation, data, make_rows)
            validation = validation.select(range(min(len(validation), data.validation_rows)))
        if not data.streaming:
            train = prepare_rows(train, data, make_rows)

    mask = MaskTokens(tokenizer, data.mask_probability, data.whole_words)
    mask_validation = MaskTokens(tokenizer, data.validation_mask_probability, data.whole_words)
    if data.streaming:
        stream = {"column": data.text_column, "buffer_size": data.shuffle_buffer, "seed": args.seed}
        train_dataset: Any = TextStream(train, make_rows, mask, **stream)
        trainer_class: type[LionTrainer] = StreamingTrainer
        logger.info("streaming from %d shards; empty documents are left out", train.num_shards)
    else:
        train_dataset, trainer_class = SeededDataset(train, mask, args.seed), LionTrainer
        logger.info("%d rows to train on", len(train))

    trainer = trainer_class(
        model,
        args,
        train_dataset=train_dataset,
        eval_dataset=None
        if validation is None
        else SeededDataset(validation, mask_validation, args.seed, vary=False),
        data_collator=functools.partial(pad_rows, pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        compute_metrics=masked_metrics,
        preprocess_logits_for_metrics=count_right,
    )
    family = getattr(model.config, "mask_type", "")
    kind, millions = model.config.model_type, model.num_parameters() / 1e6
    metrics = run(
        trainer,
        title=f"{kind} {family} as masked language model, {millions:.1f} M parameters",
        metric="masked_accuracy",
        dataset=data.dataset or ", ".join(Path(file).name for file in data.train_file),
        settings=(model_settings, data),
        finish=functools.partial(predict_all_words, args),
    )
    shown = {
        name: metrics[f"eval_{name}"]
        for name in ("masked_accuracy", "loss", "perplexity")
        if f"eval_{name}" in metrics
    }
    logger.info(
        "%s in %s",
        ", ".join(f"{name} {value:.4g}" for name, value in shown.items()) or "done",
        args.output_dir,
    )
    return metrics


def predict_all_words(args: LionTrainingArguments, _: dict[str, float]) -> None:
    """Lets the saved model compute the scores of all words again."""
    if args.should_save:
        config = AutoConfig.from_pretrained(args.output_dir)
        config.sparse_prediction = False
        config.save_pretrained(args.output_dir)


def load_text(data: DataSettings, part: str) -> datasets.Dataset | datasets.IterableDataset | None:
    """The documents of a part, "train" or "validation"; None if there is no such part. Training text may be a stream."""
    files, split = getattr(data, f"{part}_file"), getattr(data, f"{part}_split")
    streaming = data.streaming and part == "train"
    if data.dataset is not None:
        if part == "validation" and data.streaming:
            text = datasets.load_dataset(
                data.dataset, data.dataset_config, split=split, streaming=True
            )
            text = datasets.Dataset.from_list(list(text.take(data.validation_rows)))
        else:
            text = datasets.load_dataset(
                data.dataset, data.dataset_config, split=split, streaming=streaming
            )
    elif files is None:
        return None
    else:
        found = {file: sorted(glob.glob(file, recursive=True)) for file in files}
        for file, paths in found.items():
            if not paths:
                raise SystemExit(f"--{part}_file {file}: there is no such file")
        paths = sum(found.values(), [])
        loaders = {LOADERS.get(Path(path).suffix) for path in paths}
        if len(loaders) > 1 or None in loaders:
            raise SystemExit(
                f"--{part}_file {' '.join(files)}: expected files of one kind among {', '.join(LOADERS)}"
            )
        text = datasets.load_dataset(
            loaders.pop(), data_files=paths, split="train", streaming=streaming
        )
    columns = text.column_names or list(next(iter(text)))
    if data.text_column not in columns:
        raise SystemExit(
            f"--text_column {data.text_column}: the {part} data has {', '.join(columns)}"
        )
    return text.select_columns([data.text_column])


def load_tokenizer(
    settings: ModelSettings, train: datasets.Dataset, column: str, folder: Path, write: bool
) -> PreTrainedTokenizerBase:
    """The model's or another's tokenizer, or one trained on the text, which a continued run finds in its folder."""
    if not settings.train_tokenizer:
        name = settings.tokenizer
        if name is None:
            model = find_preset(settings.model)
            own = not Path(model).is_dir() or Path(model, "tokenizer_config.json").is_file()
            name = model if own else "google-bert/bert-base-uncased"
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        for token in ("mask_token", "pad_token", "cls_token", "sep_token"):
            if getattr(tokenizer, token) is None:
                raise SystemExit(
                    f"--tokenizer {name} has no {token}, which masked language modelling needs"
                )
        return tokenizer
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    if not write:
        raise SystemExit(
            f"--train_tokenizer: {folder} is not the first process's folder; pass --tokenizer FOLDER instead"
        )
    if isinstance(train, datasets.IterableDataset):
        raise SystemExit(
            "--train_tokenizer needs all of the text: train it without --streaming, then pass --tokenizer FOLDER"
        )
    logger.info("training a tokenizer of %d words", settings.vocab_size)
    batches = (train[start : start + 1000][column] for start in range(0, len(train), 1000))
    # BERT's normalisation and splitting into words, with a vocabulary of this text
    tokenizer = BertTokenizer().train_new_from_iterator(
        ([text for text in batch if text] for batch in batches),
        vocab_size=settings.vocab_size,
        show_progress=False,
    )
    partial = folder / ".tokenizer"
    tokenizer.save_pretrained(partial)
    for file in sorted(
        partial.iterdir(), key=lambda file: file.name == "tokenizer.json"
    ):  # last the one that is looked for
        file.replace(folder / file.name)
    partial.rmdir()
    return tokenizer


def build_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of the settings, with weights if there are any and they are wanted."""
    settings = dataclasses.replace(settings, model=find_preset(settings.model))
    config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    weights = not settings.from_scratch and has_weights(settings.model)
    try:
        overrides = parse_overrides(settings.model_overrides, config)
    except ValueError as error:
        raise SystemExit(f"--model_overrides: {error}") from error
    if not weights:
        overrides = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        } | overrides
    config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False, **overrides)
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"the tokenizer has {len(tokenizer)} words, {settings.model} only {config.vocab_size}: use its own tokenizer"
        )
    config.sparse_prediction = settings.sparse_prediction
    logger.info("weights: %s", settings.model if weights else "random")
    if weights:
        options = {"config": config, "dtype": torch.float32, "trust_remote_code": False}
        return AutoModelForMaskedLM.from_pretrained(settings.model, **options)
    if limit := length_limit(config):  # a borrowed tokenizer has that of the model it came with
        tokenizer.model_max_length = limit
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def check_length(config, max_length: int) -> None:
    """Ends the program if the rows are longer than the model's position embeddings."""
    longest = (
        config.max_position_embeddings
        if getattr(config, "use_position_embeddings", True)
        else max_length
    )
    if max_length > longest:
        raise SystemExit(
            f"--max_length {max_length}: the model has {longest} positions; add max_position_embeddings={max_length} to"
            " --model_overrides (from scratch), or take shorter rows"
        )


def prepare_rows(text: datasets.Dataset, data: DataSettings, make_rows) -> datasets.Dataset:
    """All rows of the documents. Empty documents are left out and counted."""
    kind = text.features[data.text_column].dtype
    if "string" not in kind:
        raise SystemExit(f"--text_column {data.text_column} holds {kind}: expected text")
    empty = sum(
        is_empty(document) for batch in text.iter(10_000) for document in batch[data.text_column]
    )
    if empty == len(text):
        raise SystemExit(
            f"--text_column {data.text_column}: all of the {len(text)} documents are empty"
        )
    if empty:
        logger.warning("%d of %d documents are empty and left out", empty, len(text))

    column = data.text_column  # not all of the settings, by which the cache would be told apart

    def columns(batch: dict[str, list]) -> dict[str, list]:
        rows = make_rows([document for document in batch[column] if not is_empty(document)])
        return {
            name: [row[name] for row in rows]
            for name in ("input_ids", "word_ids", "seq_idx")
            if rows and name in rows[0]
        }

    workers = data.preprocessing_workers
    return text.map(
        columns,
        batched=True,
        remove_columns=text.column_names,
        num_proc=workers,
        desc="preparing rows",
    )


def is_empty(document: str | None) -> bool:
    return not document or document.isspace()


def make_rows_of(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, kind: str, max_length: int
) -> list[dict]:
    """Rows of at most `max_length` tokens: `input_ids`, `word_ids` (a number a word), and for packed rows `seq_idx`.

    Every document or piece of one stands between [CLS] and [SEP]; in blocks, every row begins with [CLS], and [SEP] follows
    every document.
    """
    if not documents:
        return []
    encoded = tokenizer(
        documents,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    texts = [(ids, encoded.word_ids(n)) for n, ids in enumerate(encoded["input_ids"]) if ids]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    if kind == "blocks":
        ids, words, last = [], [], 0
        for document, numbers in texts:
            ids += [*document, sep]
            words += [last + 1 + n for n in numbers] + [last + numbers[-1] + 2]
            last = words[-1]
        blocks = [
            (ids[n : n + max_length - 1], words[n : n + max_length - 1])
            for n in range(0, len(ids), max_length - 1)
        ]
        return [
            {"input_ids": [cls, *piece], "word_ids": renumber([words[0] - 1, *words])}
            for piece, words in blocks
        ]
    size = max_length - 2
    rows = [
        {
            "input_ids": [cls, *ids[n : n + size], sep],
            "word_ids": renumber([-1, *words[n : n + size], 1 << 30]),
        }
        for ids, words in texts
        for n in range(0, len(ids), size)
    ]
    if kind == "padded":
        return rows
    packed = []
    for members in pack([len(row["input_ids"]) for row in rows], max_length):
        pieces = [rows[member] for member in members]
        packed.append(
            {
                "input_ids": [token for piece in pieces for token in piece["input_ids"]],
                "word_ids": renumber(
                    [(n, word) for n, piece in enumerate(pieces) for word in piece["word_ids"]]
                ),
                "seq_idx": [n for n, piece in enumerate(pieces) for _ in piece["input_ids"]],
            }
        )
    return packed


def renumber(names: list) -> list[int]:
    """0 for the first run of equal names, 1 for the next, and so on."""
    numbers = [0]
    for before, name in zip(names, names[1:]):
        numbers.append(numbers[-1] + (name != before))
    return numbers


@torch.no_grad()
def count_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over each row's masked tokens, (B, 3): loss in nats, right predictions, and how many there are."""
    masked = labels != -100
    logits = (
        logits if logits.dim() == 2 else logits[masked]
    ).float()  # of labelled tokens only, with sparse_prediction
    loss = torch.nn.functional.cross_entropy(logits, labels[masked], reduction="none")
    right = (logits.argmax(-1) == labels[masked]).float()
    counts = logits.new_zeros(*labels.shape, 3)
    counts[masked] = torch.stack([loss, right, torch.ones_like(loss)], dim=-1)
    return counts.sum(1)


def masked_metrics(prediction) -> dict[str, float]:
    """Accuracy, and loss and perplexity as means over all masked tokens."""
    loss, right, count = prediction.predictions.astype("float64").sum(0)
    return {
        "masked_accuracy": right / count,
        "exact_loss": loss / count,
        "perplexity": math.exp(min(loss / count, 700.0)),
    }
