"""Options of a run beside those of transformers. They load no torch, so `--help` is quick."""

import importlib.util
from dataclasses import dataclass, field


@dataclass
class RunOptions:
    """Fields that `LionTrainingArguments`, which explains them, adds to those of transformers."""

    output_dir: str = field(
        metadata={"help": "Folder of the run: checkpoints, final model, curves, settings, metrics."}
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto: continue from the newest whole checkpoint in output_dir; never; or a"
            " checkpoint's folder."
        },
    )
    do_train: bool = field(
        default=True,
        metadata={"help": "Train; with false, only evaluate (do_eval) or predict (do_predict)."},
    )
    do_eval: bool = field(
        default=False,
        metadata={"help": "Evaluate without training. A training is always evaluated at its end."},
    )
    do_predict: bool = field(
        default=False, metadata={"help": "Write predictions, after the training if there is one."}
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples per step over all processes; sets gradient_accumulation_steps."},
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "Peak of the device in TFLOP/s for model FLOPs utilisation; measured with"
            " matrix products if not given."
        },
    )
    report_to: None | str | list[str] = field(
        default_factory=lambda: (
            "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        ),
        metadata={
            "help": "Where to report to besides curves.csv and curves.png: tensorboard (if"
            " installed), wandb, none, ..."
        },
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep, besides the best one."}
    )


@dataclass
class SequenceOptions(RunOptions):
    """Fields that `SequenceArguments`, which explains them, adds to those of transformers."""

    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes that train on pieces of the same rows, so that each holds only a"
            " piece's activations (--rows blocks)."
        },
    )
