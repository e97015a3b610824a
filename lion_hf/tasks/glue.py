"""Fine-tunes a text model on GLUE, or on your own sentences or pairs, over several seeds, and reports means and deviations.

    lion-hf glue --model_name_or_path MODEL --task rte --output_dir outputs/glue
    lion-hf glue --config glue --model_name_or_path MODEL --output_dir outputs/glue
    lion-hf glue --model_name_or_path MODEL --train_file train.csv --validation_file validation.csv \\
        --seeds 1 2 3 --learning_rate 3e-4 --num_train_epochs 5 --output_dir outputs/own
    torchrun --nproc_per_node 2 -m lion_hf glue --model_name_or_path MODEL --task all --output_dir outputs/glue

MODEL is a folder or a name on the Hub with weights and tokenizer: one of LION's, or any other that classifies sequences.
Epochs, batch size (over all processes), learning rate, weight decay and seeds are each task's own, from the table in
lion_hf/tasks/glue_tasks.py; --recipes FILE.yaml changes them for single tasks, and their options (--learning_rate, ...) for all.

OUT/<task>/<seed>/ holds the model, curves and settings of a run, and OUT/results.{md,json,png} the table. Started again, the
script skips finished runs and continues an interrupted one; a run made with other settings is an error unless --redo.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..data.tables import read_table
from ..training.checkpoints import RESUME, checkpoints, find_checkpoint, remove
from ..training.run import run
from ..training.run_state import begin, digest, finish, finished, model_digest, on_first_process
from ..training.settings import parse_settings, resolved_settings
from ..training.trainer import LionTrainer, LionTrainingArguments
from .glue_tasks import SEEDS, TASKS, Task, read_recipes, task_names
from .labelled_text import Examples, examples, own_task, read_glue
from .metrics import METRICS
from .report import save_summary, summarize, table, write_predictions
from .text_classifier import build_classifier, check_weights, load_config, load_tokenizer

RECIPE = (
    "learning_rate",
    "weight_decay",
    "num_train_epochs",
    "per_device_train_batch_size",
    "seed",
)
# Settings by which two runs may differ and still be the same.
FREE = ("output_dir", "run_name", "resume", "redo", "predict", "keep_checkpoints", "per_device_train_batch_size",
        "gradient_accumulation_steps", "per_device_eval_batch_size", "disable_tqdm", "report_to", "peak_tflops", "data_dir",
        "train_file", "validation_file", "test_file", "task", "seeds", "recipes", "model_name_or_path", "tokenizer_name",
        "start_from_mnli", "mnli_checkpoint", "local_rank", "project", "total_batch_size")  # fmt: skip
FREE_GROUPS = (
    "logging_",
    "log_",
    "save_",
    "dataloader_",
    "hub_",
    "push_to_hub",
    "ddp_",
    "trackio_",
)


def option(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass
class GlueArguments:
    """What is fine-tuned on which data."""

    model_name_or_path: str = field(
        metadata={"help": "Folder, or name on the Hub, of a text model."}
    )
    task: str | None = option(
        f"Tasks, separated by commas, of {', '.join(TASKS)}; or all (but wnli). With train_file: a name for your own data."
    )
    seeds: list[int] = field(
        default_factory=list,
        metadata={"help": f"Seeds; if not given, as many as the task's table says of {SEEDS}."},
    )
    data_dir: str | None = option(
        "Folder with GLUE as files DIR/<task>/{train,validation,test}.{csv,json,jsonl,parquet} with GLUE's columns (mnli:"
        " validation_matched and validation_mismatched). Not given: nyu-mll/glue from the Hub."
    )
    train_file: str | None = option(
        "Your own training data, .csv, .json, .jsonl or .parquet, in place of GLUE."
    )
    validation_file: str | None = option("Validation data with the same columns.")
    test_file: str | None = option(
        "Data without labels, whose predictions are written to predictions.tsv."
    )
    sentence1_column: str | None = option(
        "Column of the text in your own data; found by usual names if not given."
    )
    sentence2_column: str | None = option("Column of the second sentence of a pair.")
    label_column: str | None = option(
        "Column of classes (names or numbers) or of a real-valued target."
    )
    regression: bool | None = option(
        "Whether the target of your own data is real-valued; if not given: if all labels are numbers and one has a fraction."
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Metrics of your own data, of {', '.join(METRICS)}; if not given: accuracy, or the correlations."
        },
    )
    recipes: str | None = option(
        "YAML file that changes the tasks' settings, with lines such as `rte: {epochs: 5}`."
    )
    max_length: int = option("Tokens of a row at most; longer ones are cut.", 128)
    tokenizer_name: str | None = option(
        "Folder or name of the tokenizer, if it is not with the model."
    )
    trust_remote_code: bool = option("Run code that comes with a model from the Hub.", False)
    from_scratch: bool = option(
        "Start from random weights, to see what pretraining is worth.", False
    )
    start_from_mnli: bool = option(
        "Start RTE, MRPC and STS-B from the model fine-tuned on MNLI, which then runs first.", False
    )
    mnli_checkpoint: str | None = option("The same, from this model fine-tuned on MNLI before.")
    attention_form: str | None = option("LION's form: auto, attention, chunk or recurrent.")
    model_overrides: str | None = option(
        "Fields of the model's configuration, name=value,name=value: classifier_pooling=mean, hidden_dropout_prob=0.2, ..."
    )
    predict: bool = option(
        "Also write predictions of the test sets, as GLUE's server takes them.", False
    )
    redo: bool = option(
        "Delete and repeat runs that are finished, or were begun with other settings.", False
    )
    keep_checkpoints: bool = option("Keep the checkpoints of finished runs.", False)

    def __post_init__(self):
        own = self.train_file is not None
        if self.task is None and not own:
            raise ValueError(
                f"task is missing: expected names among {tuple(TASKS)}, or 'all', or a train_file in their place"
            )
        if own and self.task in TASKS:
            raise ValueError(
                f"task={self.task!r} with train_file: that is one of GLUE's; name your own data otherwise"
            )
        if own and Path(self.task or "own").name != (self.task or "own"):
            raise ValueError(
                f"task={self.task!r}: expected a name for your own data that can be a folder's"
            )
        columns = ("sentence1_column", "sentence2_column", "label_column")
        for name in ("validation_file", "test_file", *columns, "regression", "metrics"):
            if getattr(self, name) not in (None, []) and not own:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} without train_file: it is for your own data"
                )
        if own and self.validation_file is None:
            raise ValueError("train_file without validation_file: expected both")
        for name in ("data_dir", "recipes", "predict", "start_from_mnli", "mnli_checkpoint"):
            if getattr(self, name) and own:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with train_file: it is for GLUE's tasks"
                )
        if self.sentence2_column and not self.sentence1_column:
            raise ValueError(f"sentence2_column={self.sentence2_column!r} without sentence1_column")
        if self.max_length < 3:
            raise ValueError(
                f"max_length={self.max_length}: expected at least 3, for a word between the special tokens"
            )


@dataclass
class GlueTrainingArguments(LionTrainingArguments):
    """LionTrainingArguments with GLUE's defaults. Those that are None are each task's own."""

    learning_rate: float | None = option("Peak learning rate; the task's own if not given.")
    weight_decay: float | None = option("Weight decay; the task's own if not given.")
    num_train_epochs: float | None = option("Epochs; the task's own if not given.")
    per_device_train_batch_size: int | None = option(
        "Rows a step on each process; if not given, the task's own over all."
    )
    seed: int | None = option("The only seed; --seeds for several.")
    adam_beta2: float = option("AdamW's second beta.", 0.98)
    adam_epsilon: float = option("AdamW's epsilon.", 1e-6)
    warmup_steps: float = option("Steps of warm-up, or their share if below 1.", 0.06)
    eval_strategy: str = option("When to evaluate: epoch, steps or no.", "epoch")
    save_strategy: str = option("When to write checkpoints: epoch, steps or no.", "epoch")
    logging_steps: float = option("Steps between log entries.", 50)
    per_device_eval_batch_size: int = option("Rows of an evaluation step on each process.", 32)

    def __post_init__(self):
        self.given = {
            name: getattr(self, name) for name in RECIPE if getattr(self, name) is not None
        }
        defaults = {f.name: f.default for f in dataclasses.fields(LionTrainingArguments)} | {
            "per_device_train_batch_size": 1
        }
        for name in RECIPE:
            setattr(self, name, self.given.get(name, defaults[name]))
        steps = self.gradient_accumulation_steps
        super().__post_init__()
        if "per_device_train_batch_size" not in self.given:
            self.gradient_accumulation_steps = steps  # as given: `arguments_of` divides the batch


@dataclass
class Pair:
    """One run: a task with a seed."""

    name: str
    task: Task
    seed: int
    model: str
    from_scratch: bool
    args: GlueTrainingArguments
    settings: dict
    metrics: dict[str, float] | None = None


def main(argv: list[str] | None = None, prog: str | None = None) -> dict:
    """Runs the script with the command line `argv`; returns the summary."""
    options, args = parse_settings(
        __doc__, GlueArguments, GlueTrainingArguments, argv=argv, prog=prog
    )
    say = print if args.process_index == 0 else lambda *_: None
    try:
        tokenizer = load_model_parts(options)
        data = {
            name: (task, load_data(name, task, options))
            for name, task in load_tasks(options).items()
        }
        pairs = plan(data, options, args, tokenizer)
    except ValueError as error:
        raise SystemExit(f"lion-hf glue: {error}") from error
    for name, (task, splits) in data.items():
        say(describe(name, task, splits))

    results, tokens = {}, {}
    for pair in pairs:
        task, splits = data[pair.name]
        done, tested = pair.metrics is not None, set(task.test_splits) & set(splits)
        say(
            f"\n{pair.name}, seed {pair.seed}: {'finished before, in ' if done else ''}{pair.args.output_dir}"
        )
        if done:
            pair.model, pair.from_scratch = pair.args.output_dir, False
        if (tested or not done) and pair.name not in tokens:
            tokens = {
                pair.name: {
                    split: tokenize(x.data, tokenizer, options.max_length)
                    for split, x in splits.items()
                }
            }
        if tested or not done:
            trainer = make_trainer(pair, tokens[pair.name], options, tokenizer)
        if not done:
            fine_tune(pair, trainer, options)
        if tested:
            predict(pair, trainer, tokens[pair.name])
        results.setdefault(pair.name, {})[pair.seed] = pair.metrics
        summary = summarize(results)
        if args.process_index == 0:
            save_summary(
                summary,
                args.output_dir,
                title=f"{options.task or 'own'}: {Path(options.model_name_or_path).name}",
            )
    say(f"\n{table(summary)}\n\nTable and picture are in {args.output_dir}/results.*")
    return summary


# Data


def load_tasks(options: GlueArguments) -> dict[str, Task]:
    """The tasks to run, by name."""
    if options.train_file is not None:
        columns = [name for name in (options.sentence1_column, options.sentence2_column) if name]
        train, chosen = (
            read_table(options.train_file),
            (options.label_column, options.regression, options.metrics),
        )
        return {options.task or "own": own_task(train, options.train_file, columns, *chosen)}
    tasks = TASKS if options.recipes is None else read_recipes(options.recipes)
    names = task_names(options.task)
    if options.start_from_mnli and options.mnli_checkpoint is None and "mnli" not in names:
        names.insert(0, "mnli")
    return {name: tasks[name] for name in names}


def load_data(name: str, task: Task, options: GlueArguments) -> dict[str, Examples]:
    """A task's splits: training, validation, and test where predictions are asked for."""
    own = {
        "train": options.train_file,
        "validation": options.validation_file,
        "test": options.test_file,
    }
    test = task.test_splits if options.predict or options.test_file else ()
    splits = {}
    for split in ("train", *(split for split, _ in task.splits), *test):
        rows, source = (
            (read_table(own[split]), own[split])
            if task.own
            else read_glue(name, split, options.data_dir)
        )
        splits[split] = examples(rows, source, task, labelled=split not in test)
    if task.classes and len(splits["train"].counts) < 2:
        (only,) = splits["train"].counts
        raise ValueError(
            f"{name}: all training rows have the class {only!r}; expected at least two classes"
        )
    return splits


def describe(name: str, task: Task, splits: dict[str, Examples]) -> str:
    """A line on the data: rows, rows left out, and classes."""
    parts = []
    for split, found in splits.items():
        skipped = f" ({found.skipped} without text left out)" if found.skipped else ""
        parts.append(f"{split} {len(found.data):,} rows{skipped}")
    target = f"classes {', '.join(task.classes)}" if task.classes else "a real-valued target"
    return f"{name}: {', '.join(parts)}; {target}"


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Columns of sentences to tokens; the collator pads."""
    sentences = [name for name in data.column_names if name != "labels"]
    return data.map(
        lambda rows: dict(
            tokenizer(*(rows[name] for name in sentences), truncation=True, max_length=max_length)
        ),
        batched=True,
        remove_columns=sentences,
    )


# Runs


def load_model_parts(options: GlueArguments) -> PreTrainedTokenizerBase:
    """The tokenizer, after checks of all that is loaded later."""
    for path in filter(None, (options.model_name_or_path, options.mnli_checkpoint)):
        config = configuration(path, options)
        if not options.from_scratch or path == options.mnli_checkpoint:
            check_weights(path)
    return load_tokenizer(
        options.tokenizer_name or options.model_name_or_path, config, options.trust_remote_code
    )


def configuration(path: str, options: GlueArguments) -> PreTrainedConfig:
    """A model's configuration with the changes that the options ask for."""
    form = {} if options.attention_form is None else {"attention_form": options.attention_form}
    return load_config(
        path, options.model_overrides, form, options.max_length, options.trust_remote_code
    )


def plan(
    data: dict,
    options: GlueArguments,
    args: GlueTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Pair]:
    """All runs with their settings; those that are finished have their metrics."""
    pairs, digests = [], {}
    if options.seeds and "seed" in args.given:
        raise ValueError(f"seeds={options.seeds} and seed={args.seed}: expected one of them")
    for name, (task, splits) in data.items():
        seeds = options.seeds or (
            [args.given["seed"]] if "seed" in args.given else SEEDS[: task.seeds]
        )
        for seed in dict.fromkeys(seeds):
            own = arguments_of(name, task, seed, args)
            after_mnli = task.from_mnli and (
                options.start_from_mnli or options.mnli_checkpoint is not None
            )
            start = (
                (options.mnli_checkpoint or pairs[0].args.output_dir)
                if after_mnli
                else options.model_name_or_path
            )
            random = options.from_scratch and not after_mnli
            settings = settings_of(options, own, tokenizer, splits)
            if (
                start not in digests
            ):  # of MNLI's first run, which has no weights yet, what they will be made by
                waits = after_mnli and not options.mnli_checkpoint
                digests[start] = (
                    digest(pairs[0].settings) if waits else model_digest(start, weights=not random)
                )
            settings["model"] = digests[start]
            pairs.append(Pair(name, task, seed, start, random, own, settings))
    if args.resume not in RESUME and len(pairs) > 1:
        raise ValueError(
            f"resume={args.resume!r} with {len(pairs)} runs: expected one of {RESUME}, or one task and one seed"
        )
    known = on_first_process(
        args,
        lambda: [finished(pair.args.output_dir, pair.settings, options.redo) for pair in pairs],
    )
    for pair, metrics in zip(pairs, known):
        pair.metrics = metrics
        if metrics is None and args.resume != "auto":
            find_checkpoint(
                pair.args.output_dir, args.resume
            )  # raises if there is none, or one for "never"
    return pairs


def arguments_of(
    name: str, task: Task, seed: int, args: GlueTrainingArguments
) -> GlueTrainingArguments:
    """The trainer's arguments for a run: the task's own, where the user gave no others."""
    parts = max(1, args.world_size) * max(1, args.n_gpu) * args.gradient_accumulation_steps
    total = args.total_batch_size or task.batch_size
    if "per_device_train_batch_size" not in args.given and total % parts:
        raise ValueError(
            f"{name} takes batches of {total} rows, which {parts} parts (processes times"
            " gradient_accumulation_steps) cannot share evenly: give per_device_train_batch_size"
        )
    recipe = {
        "learning_rate": task.learning_rate,
        "weight_decay": task.weight_decay,
        "num_train_epochs": task.epochs,
    }
    recipe |= {"per_device_train_batch_size": total // parts} | args.given | {"seed": seed}
    own = copy.copy(args)
    for key, value in {**recipe, "output_dir": str(Path(args.output_dir, name, str(seed)))}.items():
        setattr(own, key, value)
    if args.push_to_hub:  # every run has a repository of its own
        base = args.hub_model_id or Path(args.output_dir).absolute().name
        own.hub_model_id = f"{base}-{name}-{seed}"
    return own


def settings_of(options, args, tokenizer, splits: dict[str, Examples]) -> dict:
    """What a run's result depends on besides the model, as plain values."""
    settings = resolved_settings(options, args)
    settings = {
        k: v for k, v in settings.items() if k not in FREE and not k.startswith(FREE_GROUPS)
    }
    parts = max(1, args.world_size) * max(1, args.n_gpu) * args.gradient_accumulation_steps
    settings["batch_size"] = args.per_device_train_batch_size * parts
    settings["vocabulary"] = digest(tokenizer.get_vocab())
    return settings | {
        f"{split} data": found.digest
        for split, found in splits.items()
        if not split.startswith("test")
    }


def make_trainer(
    pair: Pair,
    tokens: dict[str, Dataset],
    options: GlueArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> LionTrainer:
    """The trainer of a run with its model and data."""
    task = pair.task
    evaluation = {prefix.rstrip("_"): tokens[split] for split, prefix in task.splits}
    set_seed(pair.seed)
    config = configuration(pair.model, options)
    return LionTrainer(
        build_classifier(
            pair.model, config, task.classes, pair.from_scratch, options.trust_remote_code
        ),
        pair.args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=tokens["train"],
        eval_dataset=evaluation.get("", evaluation),
        processing_class=tokenizer,
        compute_metrics=lambda found: task.measure(found.predictions, found.label_ids),
    )


def fine_tune(pair: Pair, trainer: LionTrainer, options: GlueArguments) -> None:
    """Trains and evaluates a run, and leaves its metrics in the pair and on disk."""
    task, folder = pair.task, pair.args.output_dir
    if trainer.is_world_process_zero():
        begin(folder, pair.settings)
    metrics = run(
        trainer,
        title=f"{pair.name}, seed {pair.seed}",
        name=f"{Path(options.model_name_or_path).name}-{pair.name}-{pair.seed}",
        metric=task.splits[0][1] + task.metrics[0],
        dataset=pair.name if task.own else "nyu-mll/glue",
        settings=[dataclasses.replace(options, task=pair.name, seeds=[], redo=False)],
    )
    pair.metrics = {
        prefix + key: metrics[f"eval_{prefix}{key}"]
        for _, prefix in task.splits
        for key in task.metrics
    }
    if trainer.is_world_process_zero():
        finish(folder, pair.settings, pair.metrics)
        for checkpoint in [] if options.keep_checkpoints else checkpoints(folder):
            remove(checkpoint)


def predict(pair: Pair, trainer: LionTrainer, tokens: dict[str, Dataset]) -> None:
    """Writes the predictions of the test sets that were read."""
    for split, file in zip(pair.task.test_splits, pair.task.submission):
        if split in tokens:
            logits = trainer.predict(tokens[split]).predictions
            if trainer.is_world_process_zero():
                write_predictions(
                    Path(pair.args.output_dir, file), pair.task.predictions(logits), pair.task
                )
