"""Settings of `lion-hf glue`: model, data, and how it is trained. They load no torch."""

import re
from dataclasses import dataclass, field
from typing import Any

from ..training.options import RunOptions

USAGE = """Fine-tunes a text model on GLUE, or on your own sentences or pairs, over several seeds.

    lion-hf glue --model_name_or_path MODEL --task rte --output_dir outputs/glue
    lion-hf glue --config glue --model_name_or_path MODEL --output_dir outputs/glue
    lion-hf glue --model_name_or_path MODEL \\
        --train_file train.csv --validation_file validation.csv --seeds 1 2 3 \\
        --learning_rate 3e-4 --num_train_epochs 5 --output_dir outputs/own
    torchrun --nproc_per_node 2 -m lion_hf glue --model_name_or_path MODEL --task all \\
        --output_dir outputs/glue
    lion-hf glue --do_train false --do_eval true --model_name_or_path FINE_TUNED \\
        --validation_file new.csv --output_dir outputs/evaluation

MODEL is a folder or a name on the Hub with weights and tokenizer: a LION model, or any other that
classifies sequences. Each task has its own epochs, batch size (over all processes), learning rate,
weight decay and seeds, from the table in lion_hf/tasks/glue_tasks.py. --recipes FILE.yaml changes
them for single tasks, and their options (--learning_rate, ...) for all tasks.

OUT/<task>/<seed>/ holds the model, curves and settings of a run, and OUT/results.{md,json,png} the
table of means and deviations. When it is started again, the command skips finished runs and
continues an interrupted one; a run that was made with other settings is an error unless --redo.

Without training (--do_train false), --do_eval and --do_predict evaluate the finished runs in OUT
that started from MODEL; where there are none, MODEL itself, which must be fine-tuned. The table is
then OUT/eval_results.{md,json,png}, and eval_metrics.json and the predictions are with each model.
"""

# The names of the tables TASKS in glue_tasks.py and METRICS in metrics.py, which load torch.
TASK_NAMES = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
METRIC_NAMES = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr")
SEEDS = (19, 8364, 717, 10536, 90166)  # a task takes the first ones

# Settings that each task has its own values of.
RECIPE = (
    "learning_rate",
    "weight_decay",
    "num_train_epochs",
    "per_device_train_batch_size",
    "seed",
)
OWN_NAME = re.compile(r"\w[\w.+-]*")  # of users' own data, whose runs have a folder of this name
LARGEST_SEED = 2**32 - 1  # of numpy


def option(help: str, default: Any = None) -> Any:
    """A field with a help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class GlueArguments:
    """Which model is fine-tuned on which data."""

    model_name_or_path: str = field(
        metadata={"help": "Folder, or name on the Hub, of a text model."}
    )
    task: str | None = option(
        f"Tasks, separated by commas, among {', '.join(TASK_NAMES)}; or all (without wnli)."
        " With your own data: a name for it."
    )
    seeds: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Seeds, one run each. By default each task has its own number of seeds out of"
            f" {SEEDS}."
        },
    )
    data_dir: str | None = option(
        "Folder with GLUE as files DIR/<task>/{train,validation,test}.{csv,json,jsonl,parquet} with"
        " GLUE's columns (mnli: validation_matched and validation_mismatched). By default"
        " nyu-mll/glue from the Hub."
    )
    train_file: str | None = option(
        "Your own training data, .csv, .json, .jsonl or .parquet, in place of GLUE."
    )
    validation_file: str | None = option("Validation data with the same columns.")
    test_file: str | None = option(
        "Data without labels, whose predictions are written to predictions.tsv."
    )
    sentence1_column: str | None = option(
        "Column of the text in your own data. By default it is found by the usual names."
    )
    sentence2_column: str | None = option("Column of the second sentence of a pair.")
    label_column: str | None = option(
        "Column of classes (text, integers or booleans) or of a real-valued target."
    )
    regression: bool | None = option(
        "Whether the target of your own data is real-valued. By default it is if the column holds"
        " floats; columns of CSV files hold text."
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Metrics of your own data, among {', '.join(METRIC_NAMES)}. By default"
            " accuracy, or the correlations for a real-valued target."
        },
    )
    recipes: str | None = option(
        "YAML file that changes settings of single tasks, with lines such as `rte: {epochs: 5}`."
    )
    max_length: int = option("Maximum number of tokens per row; longer ones are cut.", 128)
    tokenizer_name: str | None = option(
        "Folder or name of the tokenizer, if it is not with the model."
    )
    trust_remote_code: bool = option("Run code that comes with a model from the Hub.", False)
    from_scratch: bool = option(
        "Start from random weights, to see what the pretraining is worth.", False
    )
    start_from_mnli: bool = option(
        "Start RTE, MRPC and STS-B from the model fine-tuned on MNLI, which then runs first.", False
    )
    mnli_checkpoint: str | None = option(
        "Start them from this model, which was fine-tuned on MNLI before."
    )
    attention_form: str | None = option(
        "How LION computes attention: auto, attention, chunk or recurrent."
    )
    model_overrides: str | None = option(
        "Fields of the model's configuration, name=value,name=value: classifier_pooling=mean,"
        " hidden_dropout_prob=0.2, ..."
    )
    predict: bool = option(
        "Also write predictions of the test sets, as GLUE's server takes them.", False
    )
    redo: bool = option(
        "Repeat runs that are finished, or were begun with other settings. Their results and"
        " checkpoints are deleted.",
        False,
    )
    keep_checkpoints: bool = option("Keep the checkpoints of finished runs.", False)

    @property
    def own_data(self) -> bool:
        """Whether the data is the user's own, not GLUE's."""
        return any((self.train_file, self.validation_file, self.test_file))

    def __post_init__(self):
        self._check_task()
        self._check_data()
        for seed in self.seeds:
            check_seed("seeds", seed)
        if self.sentence2_column and not self.sentence1_column:
            raise ValueError(f"sentence2_column={self.sentence2_column!r} without sentence1_column")
        if self.max_length < 3:
            raise ValueError(
                f"max_length={self.max_length}: expected at least 3, for a word between the special"
                " tokens"
            )

    def _check_task(self) -> None:
        if not self.own_data:
            if self.task is None:
                raise ValueError(
                    f"task is missing: expected names among {TASK_NAMES}, or 'all', or a"
                    " train_file in their place"
                )
            return
        if self.task in TASK_NAMES:
            raise ValueError(
                f"task={self.task!r} with train_file: that is one of GLUE's; give your own data"
                " another name"
            )
        if self.task is not None and not OWN_NAME.fullmatch(self.task):
            raise ValueError(
                f"task={self.task!r}: expected a name for your own data that can be a folder's:"
                " letters, digits, '_', and inside also '.', '+' and '-'"
            )

    def _check_data(self) -> None:
        own_only = ("sentence1_column", "sentence2_column", "label_column", "regression", "metrics")
        for name in own_only:
            if getattr(self, name) not in (None, []) and not self.own_data:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} without train_file: it is for your own data"
                )
        for name in ("data_dir", "recipes", "predict", "start_from_mnli", "mnli_checkpoint"):
            if getattr(self, name) and self.own_data:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with train_file: it is for GLUE's tasks"
                )


@dataclass
class GlueRunOptions(RunOptions):
    """`RunOptions` with GLUE's defaults. Those that are None are each task's own."""

    learning_rate: float | None = option("Peak learning rate. By default the task's own.")
    weight_decay: float | None = option("Weight decay. By default the task's own.")
    num_train_epochs: float | None = option("Epochs. By default the task's own.")
    per_device_train_batch_size: int | None = option(
        "Rows per step and process. By default the processes share the task's own batch."
    )
    seed: int | None = option("The only seed; --seeds for several.")
    adam_beta2: float = option("AdamW's second beta.", 0.98)
    adam_epsilon: float = option("AdamW's epsilon.", 1e-6)
    warmup_steps: float = option("Steps of warm-up, or their share if below 1.", 0.06)
    eval_strategy: str = option("When to evaluate: epoch, steps or no.", "epoch")
    save_strategy: str = option("When to write checkpoints: epoch, steps or no.", "epoch")
    logging_steps: float = option("Steps between log entries.", 50)
    per_device_eval_batch_size: int = option("Rows per evaluation step and process.", 32)


OPTIONS = (GlueArguments, GlueRunOptions)  # what `--help` shows


def check_seed(name: str, seed: int) -> None:
    """Raises ValueError for a seed that numpy would not take."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"{name}={seed}: expected integers from 0 to {LARGEST_SEED}")


def check_actions(options: GlueArguments, args: RunOptions) -> None:
    """Checks that there is data for what is asked for: training, evaluation, prediction.

    Raises:
        ValueError: if a file is missing or useless, or there is nothing to do.
    """
    if args.do_train and options.own_data:
        for name in ("train_file", "validation_file"):
            if getattr(options, name) is None:
                raise ValueError(f"{name} is missing: training on your own data needs it")
    if args.do_predict and options.own_data and options.test_file is None:
        raise ValueError("do_predict without test_file: expected data to predict")
    if args.do_train:
        return
    if args.do_eval and options.own_data and options.validation_file is None:
        raise ValueError("do_eval without validation_file: expected data to evaluate on")
    if not (args.do_eval or args.do_predict or options.predict or options.test_file):
        raise ValueError(
            "do_train=False: expected do_eval, or do_predict (test_file for your own data), or"
            " there is nothing to do"
        )
    for name in ("redo", "from_scratch", "start_from_mnli", "mnli_checkpoint"):
        if getattr(options, name):
            raise ValueError(f"{name} with do_train=False: it is for trainings")
