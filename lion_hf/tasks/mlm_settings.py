"""Settings of `lion-hf mlm`: what is trained, and on what. They load no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..training.options import SequenceOptions

if TYPE_CHECKING:
    from ..training.sequence_trainer import SequenceArguments

USAGE = """Pretrains LION as a masked language model, from scratch or from a checkpoint.

    # the recipe of LION-S base on C4, streamed, on 8 GPUs: 70,000 steps of 4,096 rows
    accelerate launch --config_file configs/accelerate/ddp.yaml -m lion_hf mlm \\
        --config mlm/lion-s-base --output_dir outputs/lion-s-base

    # your own text (one document per line; also JSON, CSV, parquet), a small model, and a
    # vocabulary of that text
    lion-hf mlm --train_file train.txt --validation_file validation.txt \\
        --train_tokenizer --vocab_size 8192 --model lion-s-base \\
        --model_overrides hidden_size=256,num_hidden_layers=4,num_attention_heads=4 \\
        --rows packed --max_length 256 --max_steps 2000 --output_dir outputs/my-lion

    # evaluate a model, and write its guesses for masked tokens, without training
    lion-hf mlm --do_train false --do_eval true --do_predict true --model outputs/my-lion \\
        --validation_file new.txt --output_dir outputs/evaluation

When it is started again, the command continues from the newest whole checkpoint. At the end the
folder holds the model with a model card, curves (PNG, CSV), the settings, and the metrics: masked
accuracy, loss and perplexity on the validation text. With --do_predict, predictions.jsonl holds the
text with its masks and the five best guesses for each of them; to fill in masks of your own, use
transformers' pipeline("fill-mask").
"""

SHORTEST_ROW = 8  # tokens


def option(help: str, default: Any = None) -> Any:
    """A field with a help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelSettings:
    """What to train."""

    model: str = option(
        "Preset, model folder or Hub name. With weights, training starts from them, unless"
        " --from_scratch.",
        "modern-lion-s-base",
    )
    from_scratch: bool = option("Start from random weights even if there are others.", False)
    model_overrides: str | None = option("Fields of the configuration: name=value,name=value.")
    sparse_prediction: bool = option(
        "Compute the scores of words for masked tokens only. The final model computes all again.",
        True,
    )
    tokenizer: str | None = option(
        "Tokenizer folder or Hub name. By default the model's own, else bert-base-uncased."
    )
    train_tokenizer: bool = option(
        "Train a lower-case WordPiece tokenizer on the training text.", False
    )
    vocab_size: int = option("Words of a trained tokenizer.", 30522)


@dataclass
class DataSettings:
    """What to train on."""

    train_file: list[str] | None = option(
        "Text (one document per line), JSON, CSV or parquet files, also with .gz after the suffix,"
        " or patterns such as data/*.txt."
    )
    validation_file: list[str] | None = option("The same, to evaluate on.")
    test_file: list[str] | None = option(
        "The same, to predict masked tokens of with --do_predict. By default the validation text."
    )
    dataset: str | None = option("Data set on the Hub, in place of files, such as allenai/c4.")
    dataset_config: str | None = option("Its configuration, such as en.")
    train_split: str = option("Its split to train on.", "train")
    validation_split: str = option("Its split to evaluate on.", "validation")
    text_column: str = option("Column of the text.", "text")
    streaming: bool = option("Read while training, instead of preparing all rows before.", False)
    shuffle_buffer: int = option("Documents that a stream shuffles together.", 10_000)
    validation_rows: int = option("Rows to evaluate and to predict, the first ones.", 10_000)
    rows: Literal["padded", "blocks", "packed"] = option(
        "padded: one document per row, long ones in several rows; blocks: documents one after the"
        " other, cut into full rows; packed: several documents per row, which do not see each"
        " other.",
        "padded",
    )
    max_length: int = option("Tokens per row, special ones included.", 128)
    mask_probability: float = option("Share of tokens to predict in training.", 0.3)
    validation_mask_probability: float = option("The same in evaluation.", 0.15)
    whole_words: bool = option("Mask words with all their tokens.", False)
    preprocessing_workers: int | None = option("Processes that prepare the rows.")

    def __post_init__(self):
        if self.max_length < SHORTEST_ROW:
            raise ValueError(
                f"max_length={self.max_length}: expected an integer of at least {SHORTEST_ROW}"
            )
        for name in ("mask_probability", "validation_mask_probability"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number between 0 and 1")
        for name in ("shuffle_buffer", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 1")


OPTIONS = (ModelSettings, DataSettings, SequenceOptions)  # what `--help` shows


def check_settings(model: ModelSettings, data: DataSettings, args: SequenceArguments) -> None:
    """Checks what no group of settings can check alone.

    Raises:
        ValueError: if data is missing or given twice, a stream has no number of steps, or processes
            cannot share rows.
    """
    files = data.train_file or data.validation_file or data.test_file
    if data.dataset is not None and files:
        raise ValueError("expected either --train_file or --dataset, not both")
    if data.dataset is None and args.do_train and data.train_file is None:
        raise ValueError("expected either --train_file or --dataset")
    if data.dataset is None and not args.do_train:
        if args.do_eval and data.validation_file is None:
            raise ValueError("--do_eval without --validation_file: expected text to evaluate on")
        if not files:
            raise ValueError("expected --validation_file, --test_file or --dataset")
    if args.do_predict and data.dataset is None and not (data.test_file or data.validation_file):
        raise ValueError("--do_predict without --test_file: expected text to predict")
    if data.streaming and args.do_train and args.max_steps < 1:
        raise ValueError(
            f"--max_steps {args.max_steps}: a stream has no end, so --streaming needs a number of"
            " steps"
        )
    if args.sequence_parallel_size > 1 and data.rows != "blocks":
        raise ValueError(
            f"--sequence_parallel_size {args.sequence_parallel_size} with --rows {data.rows}:"
            " expected --rows blocks, because the processes' pieces hold no padding and no second"
            " document"
        )
    if data.streaming and model.train_tokenizer:
        raise ValueError(
            "--train_tokenizer needs all of the text: train it without --streaming, then pass"
            " --tokenizer FOLDER"
        )
