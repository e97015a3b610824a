"""The data of GLUE's tasks, and users' own sentences and pairs as one more task."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from ..data.labelled_text import (
    LABEL_COLUMNS,
    SENTENCE_COLUMNS,
    Examples,
    check_columns,
    examples,
)
from ..data.labels import SHOWN, LabelColumn, usual_column
from ..data.tables import SUFFIXES, read_table
from .glue_settings import GlueArguments
from .glue_tasks import TASKS, Task, read_recipes, task_names
from .metrics import METRICS

# How users' own data is fine-tuned.
OWN = Task((), (), (), epochs=3, batch_size=16, weight_decay=1e-6, seeds=1, own=True)
FEW_ROWS = 20  # up to which every row may have a class of its own


def read_glue(task: str, split: str, data_dir: str | None = None) -> tuple[Dataset, str]:
    """A split of a GLUE task, and where it comes from, for messages.

    Args:
        task: its name.
        split: its name on the Hub.
        data_dir: a folder with files `<task>/<split>` of one of `SUFFIXES`; None for nyu-mll/glue
            on the Hub.

    Raises:
        ValueError: if there is no such file, or the Hub cannot be reached.
    """
    if data_dir is None:
        source = f"nyu-mll/glue, {task}, {split}"
        try:
            return load_dataset("nyu-mll/glue", task, split=split), source
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source} cannot be read from the Hub ({error}): check the network, or give the"
                " files with data_dir"
            ) from error
    folder = Path(data_dir, task)
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return read_table(folder / f"{split}{suffix}"), str(folder / f"{split}{suffix}")
    there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise ValueError(
        f"data_dir={data_dir!r}: {folder} lacks {split} as {', '.join(SUFFIXES)}; there is {there}"
    )


def own_task(
    data: Dataset,
    source: str,
    sentences: Sequence[str] = (),
    label: str | None = None,
    regression: bool | None = None,
    metrics: Sequence[str] = (),
    classes: Sequence[str] | None = None,
) -> Task:
    """Makes a task of users' own data: finds its columns, and its classes or a real-valued target.

    Args:
        data: the training data.
        source: its name, for messages.
        sentences: the one or two columns of text; none to find them by their usual names.
        label: the column of labels; None to find it.
        regression: whether the target is real-valued; None for yes if the column holds floats.
        metrics: keys of `METRICS`; none for accuracy, or for Pearson's and Spearman's correlation.
            F1 is for two classes, and counts the second.
        classes: names of the classes, if they are known, and none for a real-valued target; None to
            find them in the data.

    Raises:
        ValueError: for columns that are missing or cannot be told, a missing label, a single class,
            or metrics of the other kind.
    """
    labelled = classes is None or label is not None
    label = _label_column(data, source, label, labelled)
    task = replace(OWN, sentences=_sentences(data, source, sentences, label), label=label)
    check_columns(data, source, task, labelled)
    if classes is None:
        labels = LabelColumn.of(data, label, source)
        regression = labels.is_real_valued if regression is None else regression
        classes = () if regression else _classes(labels, data.column_names)
    task = replace(task, classes=tuple(classes))
    return replace(task, metrics=_metrics(task, metrics))


def _label_column(data: Dataset, source: str, label: str | None, labelled: bool) -> str:
    """The column asked for, or found; without labels any of the usual names."""
    columns = data.column_names
    if label is None:
        if not labelled:
            return next((name for name in LABEL_COLUMNS if name in columns), LABEL_COLUMNS[0])
        label = usual_column("label_column", LABEL_COLUMNS, columns, source)
    if label not in columns:
        raise ValueError(f"column {label!r} is not in {source}: its columns are {columns}")
    return label


def _sentences(data: Dataset, source: str, sentences: Sequence[str], label: str) -> tuple[str, ...]:
    if sentences:
        return tuple(sentences)
    columns = data.column_names
    rest = [name for name in columns if name not in (label, "idx", "index", "id")]
    usual = (names for names in SENTENCE_COLUMNS if set(names) <= set(columns))
    found = next(usual, rest if len(rest) == 1 else None)
    if found is None:
        raise ValueError(
            f"sentence1_column: it is not clear which of the columns {columns} of {source} hold the"
            " text; name one"
        )
    return tuple(found)


def _classes(labels: LabelColumn, columns: list[str]) -> list[str]:
    """The names of two classes or more."""
    classes, rows = labels.classes(), len(labels.values)
    if len(classes) < 2:
        raise ValueError(
            f"{labels.name}: every row of {labels.source} has the class {classes[0]!r}; expected at"
            " least two classes"
        )
    if rows > FEW_ROWS and len(classes) > rows / 2:
        raise ValueError(
            f"{labels.name}: {len(classes)} classes in the {rows} rows of {labels.source}: is it "
            "the"
            f" column of labels? Its columns are {columns}; for a real-valued target give "
            "regression"
        )
    return classes


def _metrics(task: Task, metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics asked for, after a check that they fit, or the usual ones."""
    regression = not task.classes
    legal = [key for key, metric in METRICS.items() if (metric.dtype == "float64") == regression]
    if len(task.classes) > 2:
        legal.remove("f1")
    for metric in metrics:
        if metric not in legal:
            kind = "a real-valued target" if regression else f"{len(task.classes)} classes"
            raise ValueError(f"metrics={metric!r}: expected among {legal} for {kind}")
    return tuple(metrics) or (("pearson", "spearmanr") if regression else ("accuracy",))


def load_tasks(options: GlueArguments, classes: Sequence[str] | None = None) -> dict[str, Task]:
    """The tasks to run, by name.

    Args:
        options: they name the tasks, or the files of a user's own data.
        classes: of a user's own data, where they are known, as in `own_task`.
    """
    if options.own_data:
        columns = [name for name in (options.sentence1_column, options.sentence2_column) if name]
        file = options.train_file or options.validation_file or options.test_file or ""
        return {
            options.task or "own": own_task(
                read_table(file),
                file,
                columns,
                options.label_column,
                options.regression,
                options.metrics,
                classes=classes,
            )
        }
    tasks = TASKS if options.recipes is None else read_recipes(options.recipes)
    names = task_names(options.task or "")
    waits = options.start_from_mnli and options.mnli_checkpoint is None
    if waits and "mnli" not in names and any(tasks[name].from_mnli for name in names):
        names.insert(0, "mnli")
    return {name: tasks[name] for name in names}


def load_data(
    name: str, task: Task, options: GlueArguments, train: bool = True, evaluate: bool = True
) -> dict[str, Examples]:
    """A task's splits: for training, for evaluation, and test sets where predictions are asked for.

    Raises:
        ValueError: if the data cannot be read, or all training rows have one class.
    """
    own = {
        "train": options.train_file,
        "validation": options.validation_file,
        "test": options.test_file,
    }
    test = task.test_splits if options.predict or options.test_file else ()
    validation = [split for split, _ in task.splits] if evaluate else []
    splits = {}
    for split in (*["train"] * train, *validation, *test):
        if options.own_data:
            source = own[split] or ""
            rows = read_table(source)
        else:
            rows, source = read_glue(name, split, options.data_dir)
        splits[split] = examples(rows, source, task, labelled=split not in test)
    if train and task.classes and len(splits["train"].counts) < 2:
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
    target = f"classes {listed(task.classes)}" if task.classes else "a real-valued target"
    return f"{name}: {', '.join(parts)}; {target}"


def listed(classes: Sequence[str]) -> str:
    """The names of some classes, and how many there are."""
    more = f", ... ({len(classes)})" if len(classes) > SHOWN else ""
    return ", ".join(classes[:SHOWN]) + more


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Turns the columns of sentences into tokens. The collator pads them."""
    sentences = [name for name in data.column_names if name != "labels"]
    return data.map(
        lambda rows: dict(
            tokenizer(*(rows[name] for name in sentences), truncation=True, max_length=max_length)
        ),
        batched=True,
        remove_columns=sentences,
    )
