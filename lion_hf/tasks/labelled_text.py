"""Labelled sentences and pairs of sentences from files: reading, finding the columns, numbering the classes."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, load_dataset

from ..data.tables import SUFFIXES, read_table
from .glue_tasks import Task
from .metrics import METRICS

SENTENCE_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)
LABEL_COLUMNS = ("label", "labels", "target", "class", "score")
OWN = Task(
    (), (), (), epochs=3, batch_size=16, weight_decay=1e-6, seeds=1, own=True
)  # how users' own data is fine-tuned


def read_glue(task: str, split: str, data_dir: str | None = None) -> tuple[Dataset, str]:
    """A split of a GLUE task, and where it is from, for messages.

    Args:
        task: its name.
        split: its name on the Hub.
        data_dir: a folder with files `<task>/<split>` of one of `SUFFIXES`; None for nyu-mll/glue on the Hub.

    Raises:
        ValueError: if there is no such file, or the Hub is not reached.
    """
    if data_dir is None:
        source = f"nyu-mll/glue, {task}, {split}"
        try:
            return load_dataset("nyu-mll/glue", task, split=split), source
        except OSError as error:
            raise ValueError(
                f"{source} is not to be had from the Hub ({error}): data_dir takes it from files"
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
) -> Task:
    """Finds in users' own training data the columns, and classes or a real-valued target.

    Args:
        data: the training data.
        source: its name for messages.
        sentences: the one or two columns of text; none to find them by their usual names.
        label: the column of labels; None to find it.
        regression: whether the target is real-valued; None for yes if all labels are numbers and one has a fraction.
        metrics: keys of `METRICS`; none for accuracy, or for Pearson's and Spearman's correlation. F1 is for two classes, and
            counts the second in alphabetic order.

    Raises:
        ValueError: for columns that are not there or not found, a missing label, a single class, or metrics of the other kind.
    """
    columns = data.column_names
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in columns), None)
        if label is None:
            raise ValueError(
                f"label_column: none of {LABEL_COLUMNS} is in {source}; name one of its columns {columns}"
            )
    if label not in columns:
        raise ValueError(f"column {label!r} is not in {source}: its columns are {columns}")
    rest = [name for name in columns if name not in (label, "idx", "index", "id")]
    if not sentences:
        sentences = next(
            (names for names in SENTENCE_COLUMNS if set(names) <= set(columns)),
            rest if len(rest) == 1 else None,
        )
        if sentences is None:
            raise ValueError(
                f"sentence1_column: which of the columns {columns} of {source} hold the text is not plain; name one"
            )
    task = replace(OWN, sentences=tuple(sentences), label=label)
    check_columns(data, source, task)
    values = [_plain(value) for value in data[label][:]]
    _refuse_missing(values, source, label)
    numbers = [_number(value) for value in values]
    if regression is None:
        regression = None not in numbers and any(not number.is_integer() for number in numbers)
    if not regression:
        integers = all(number is not None and number.is_integer() for number in numbers)
        classes = sorted(set(values), key=float if integers else str)
        if len(classes) < 2:
            raise ValueError(
                f"{label}: every row of {source} has the class {classes[0]!r}; expected at least two classes"
            )
        if len(values) > 20 and len(classes) > len(values) / 2:
            raise ValueError(
                f"{label}: {len(classes)} classes in the {len(values)} rows of {source}: is it the column of labels? Its"
                f" columns are {columns}; for a real-valued target say regression"
            )
        task = replace(task, classes=tuple(classes))
    metrics = tuple(metrics) or (("pearson", "spearmanr") if regression else ("accuracy",))
    legal = [key for key, metric in METRICS.items() if (metric.dtype == "float64") == regression]
    if len(task.classes) > 2:
        legal.remove("f1")
    for metric in metrics:
        if metric not in legal:
            kind = "a real-valued target" if regression else f"{len(task.classes)} classes"
            raise ValueError(f"metrics={metric!r}: expected among {legal} for {kind}")
    return replace(task, metrics=metrics)


@dataclass
class Examples:
    """A split with numbered labels.

    Args:
        data: columns `sentence1`, perhaps `sentence2`, and `labels`.
        skipped: number of rows without text that were left out.
        counts: rows of each class; empty for a real-valued target.
        digest: of all texts and labels.
    """

    data: Dataset
    skipped: int
    counts: dict[str, int]
    digest: str


def examples(data: Dataset, source: str, task: Task, labelled: bool = True) -> Examples:
    """Numbers the labels and leaves out rows without text.

    Args:
        data: as read, with the task's columns. Labels are names of classes, or in GLUE's tasks also their numbers.
        source: its name for messages.
        task: one of GLUE's, or from `own_task`.
        labelled: whether to read labels and leave out rows; a test set keeps all of its rows.

    Raises:
        ValueError: for a missing column, missing labels, labels that the task does not have, or no text at all.
    """
    check_columns(data, source, task, labelled)
    texts = [
        ["" if text is None else str(text).strip() for text in data[name][:]]
        for name in task.sentences
    ]
    columns = {f"sentence{number}": column for number, column in enumerate(texts, start=1)}
    if labelled:
        columns["labels"] = _numbered(
            [_plain(value) for value in data[task.label][:]], source, task
        )
    kept = [row for row, sentences in enumerate(zip(*texts)) if all(sentences) or not labelled]
    if not kept:
        raise ValueError(f"{source}: every row of {list(task.sentences)} is empty")
    columns = {name: [column[row] for row in kept] for name, column in columns.items()}
    counts = (
        Counter(task.classes[label] for label in columns.get("labels", ())) if task.classes else {}
    )
    digest = hashlib.sha256(json.dumps(columns).encode()).hexdigest()
    return Examples(Dataset.from_dict(columns), len(data) - len(kept), dict(counts), digest)


def check_columns(data: Dataset, source: str, task: Task, labelled: bool = True) -> None:
    """Raises ValueError, listing the columns, if one that the task needs is not there."""
    for name in (*task.sentences, *[task.label] * labelled):
        if name not in data.column_names:
            raise ValueError(
                f"column {name!r} is not in {source}: its columns are {data.column_names}"
            )


def _numbered(values: list[str], source: str, task: Task) -> list[int] | list[float]:
    _refuse_missing(values, source, task.label)
    if not task.classes:
        numbers = [_number(value) for value in values]
        legal = "a finite number"
    else:
        known = {name: number for number, name in enumerate(task.classes)}
        if not task.own and all(
            _number(name) is None for name in task.classes
        ):  # else a number may be a name
            known |= {str(number): number for number in range(len(task.classes))}
        numbers = [known.get(value) for value in values]
        legal = f"one of {tuple(known)}" + ", the classes of the training data" * task.own
    wrong = [row for row, number in enumerate(numbers) if number is None]
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{task.label}={values[first]!r} in row {first + 1} of {source} ({len(wrong)} such): expected {legal}"
        )
    return numbers


def _refuse_missing(values: list[str], source: str, label: str) -> None:
    missing = [row for row, value in enumerate(values) if not value]
    if missing:
        raise ValueError(
            f"{label} is missing in {len(missing)} of {len(values)} rows of {source}, first in row {missing[0] + 1}"
        )


def _plain(value) -> str:
    """A label as text: whole numbers without a fraction, so that 1, 1.0 and "1" are one class; missing ones empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    number = _number(text)
    return str(int(number)) if number is not None and number.is_integer() else text


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
