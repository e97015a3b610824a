"""Labelled sentences and pairs from tables: which columns, which classes, which rows."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field

from datasets import Dataset, Value

from .labels import LabelColumn

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


@dataclass(frozen=True)
class TextColumns:
    """The columns of a table of labelled text, and what its labels are.

    Args:
        sentences: names of the one or two columns of text.
        classes: names of the classes in the order of their numbers; empty for a real-valued target.
        label: name of the column of labels.
        own: whether the classes are a user's, whose labels are their names. Labels of known tasks,
            such as GLUE's, may also be the classes' numbers.
    """

    sentences: tuple[str, ...]
    classes: tuple[str, ...]
    label: str = field(default="label", kw_only=True)
    own: bool = field(default=False, kw_only=True)


@dataclass
class Examples:
    """A split with numbered labels.

    Args:
        data: columns `sentence1`, perhaps `sentence2`, and `labels`.
        skipped: number of rows without text, which were left out.
        counts: rows of each class; empty for a real-valued target.
        digest: a hash of all texts and labels, and of the classes' names.
    """

    data: Dataset
    skipped: int
    counts: dict[str, int]
    digest: str


def examples(data: Dataset, source: str, columns: TextColumns, labelled: bool = True) -> Examples:
    """Numbers the labels and leaves out rows without text.

    Args:
        data: a table with these columns.
        source: the table's name, for messages.
        columns: the columns to read.
        labelled: whether to read labels and leave out rows; a test set keeps all of its rows.

    Raises:
        ValueError: for a missing column or one of another type, missing or unknown labels, or no
            text at all.
    """
    check_columns(data, source, columns, labelled)
    texts = [
        ["" if text is None else text.strip() for text in data[name][:]]
        for name in columns.sentences
    ]
    found: dict[str, list] = {
        f"sentence{number}": column for number, column in enumerate(texts, start=1)
    }
    if labelled:
        labels = LabelColumn.of(data, columns.label, source)
        found["labels"] = (
            labels.numbers(columns.classes, by_number=not columns.own)
            if columns.classes
            else labels.targets()
        )
    kept = [row for row, sentences in enumerate(zip(*texts)) if all(sentences) or not labelled]
    if not kept:
        raise ValueError(f"{source}: every row of {list(columns.sentences)} is empty")
    found = {name: [column[row] for row in kept] for name, column in found.items()}
    counts = Counter(columns.classes[n] for n in found.get("labels", ())) if columns.classes else {}
    digest = hashlib.sha256(json.dumps([columns.classes, found]).encode()).hexdigest()
    return Examples(Dataset.from_dict(found), len(data) - len(kept), dict(counts), digest)


def check_columns(data: Dataset, source: str, columns: TextColumns, labelled: bool = True) -> None:
    """Raises ValueError if a column is missing, or a column of sentences does not hold text."""
    for name in (*columns.sentences, *[columns.label] * labelled):
        if name not in data.column_names:
            raise ValueError(
                f"column {name!r} is not in {source}: its columns are {data.column_names}"
            )
    for name in columns.sentences:
        feature = data.features[name]
        kind = feature.dtype if isinstance(feature, Value) else feature
        if kind not in ("string", "large_string", "string_view", "null"):
            raise ValueError(f"column {name!r} of {source} holds {kind!s:.80}: expected text")
