"""Labels of a table: what a column of classes or targets means, by its type.

Text is never read as a number: "007" and "7" are two classes, and "1e3" is not "1000". Integers,
booleans and the `ClassLabel`s of Hugging Face tables are classes because their type says so, and a
column of floats is a real-valued target.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List, Value
from datasets.features.features import FeatureType

logger = logging.getLogger(__name__)

_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,19}")  # of 64 bits at most
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DEFAULT_NAME = re.compile(r"LABEL_\d+")
LARGEST_TARGET = 3.4e38  # of float32, in which models compute
CURE = (  # for lists
    ": make a column of each label and train a model for each, or train with a program of your own"
    " and problem_type='multi_label_classification'"
)
SHOWN = 20  # classes that an error message lists


@dataclass(frozen=True)
class LabelColumn:
    """A column of labels with its type.

    Args:
        values: one label per row; None (for floats also NaN, for a `ClassLabel` also -1) where it
            is missing.
        feature: the column's type in `datasets`.
        name: the column's name, for messages.
        source: the file or split that the column comes from, for messages.

    Raises:
        ValueError: for a type that cannot hold labels, such as lists.
    """

    values: Sequence[Any]
    feature: FeatureType
    name: str
    source: str

    def __post_init__(self):
        kinds = ("text", "integer", "bool", "float")
        if isinstance(self.feature, ClassLabel) or self._kind in kinds:
            return
        found = self.feature.dtype if isinstance(self.feature, Value) else self.feature
        if self._kind == "null":
            raise ValueError(f"{self.name} of {self.source} holds no labels: every row lacks one")
        raise ValueError(
            f"{self.name} of {self.source} holds {found!s:.80}: expected one label per row, as"
            " text, integer, boolean, float or ClassLabel; several labels per row are not supported"
            f"{CURE if isinstance(self.feature, (list, List, LargeList)) else ''}"
        )

    @classmethod
    def of(cls, data: Dataset, name: str, source: str) -> "LabelColumn":
        """The column `name` of a data set."""
        return cls(data[name][:], data.features[name], name, source)

    @property
    def is_real_valued(self) -> bool:
        """Whether the type says that the labels are targets of a regression: floats."""
        return self._kind == "float"

    def texts(self) -> list[str | None]:
        """The labels as text, None where one is missing.

        Raises:
            ValueError: for a float with a fraction, or a `ClassLabel` without a name.
        """
        if isinstance(self.feature, ClassLabel):
            return [self._name_of(row, value) for row, value in enumerate(self.values)]
        if self._kind == "float":
            return [self._text_of_float(row, value) for row, value in enumerate(self.values)]
        return [None if _is_missing(value) else str(value) for value in self.values]

    def classes(self) -> list[str]:
        """The names of the classes in the order of their numbers.

        A `ClassLabel` has its own; otherwise the names are those that occur.

        Integers, also those written as text, are in the order of their values; other names are in
        alphabetical order. A class has a name only if a row has it, so that a label of 30,000,000
        is one class of many.

        Raises:
            ValueError: if a label is missing, or as in `texts`.
        """
        if isinstance(self.feature, ClassLabel):
            return list(self.feature.names)
        found = set(self._complete(self.texts()))
        self._warn_of_spaces(found)
        if all(_PLAIN_INTEGER.fullmatch(text) for text in found):
            return sorted(found, key=int)
        return sorted(found)

    def numbers(self, classes: Sequence[str], by_number: bool = False) -> list[int]:
        """The number of each row's class.

        Args:
            classes: names of the classes in the order of their numbers.
            by_number: whether a label may also be a class's number. This holds only for classes
                none of whose names is a number; and the numbers of a `ClassLabel` count only for
                classes with the default names of transformers, LABEL_0, LABEL_1, ...

        Raises:
            ValueError: for the first label that is missing or is no class, with its row.
        """
        known = {name: number for number, name in enumerate(classes)}
        texts = self._complete(self.texts())
        if by_number and not any(_number(name) is not None for name in classes):
            known |= {str(number): number for number in range(len(classes))}
            if isinstance(self.feature, ClassLabel) and all(map(_DEFAULT_NAME.fullmatch, classes)):
                texts = [str(value) for value in self.values]
        numbers = [known.get(text) for text in texts]
        if None in numbers:
            self._refuse(texts, numbers, f"one of {_listed(list(known))}")
        return [number for number in numbers if number is not None]

    def targets(self) -> list[float]:
        """The labels as numbers that float32 holds, also those written as text in decimal digits.

        Raises:
            ValueError: for the first label that is missing or is no such number, with its row.
        """
        texts = self._complete(
            [None if _is_missing(value) else str(value) for value in self.values]
        )
        found = [_number(text) for text in texts]
        numbers = [None if x is None or abs(x) > LARGEST_TARGET else x for x in found]
        if None in numbers:
            self._refuse(texts, numbers, f"a finite number, at most {LARGEST_TARGET} in size")
        return [number for number in numbers if number is not None]

    @property
    def _kind(self) -> str:
        dtype = self.feature.dtype if isinstance(self.feature, Value) else "other"
        if dtype in ("string", "large_string", "string_view"):
            return "text"
        return (
            "integer" if dtype.removeprefix("u").startswith("int") else dtype.rstrip("0123456789")
        )

    def _name_of(self, row: int, value: int | None) -> str | None:
        if value is None or value == -1:
            return None
        names = self.feature.names
        if not 0 <= value < len(names):
            raise ValueError(
                f"{self.name}={value} in row {row + 1} of {self.source}: its ClassLabel has "
                f"{len(names)} names"
            )
        return names[value]

    def _text_of_float(self, row: int, value: float | None) -> str | None:
        if value is None or _is_missing(value):
            return None
        if not float(value).is_integer():
            raise ValueError(
                f"{self.name}={value} in row {row + 1} of {self.source} is a float, which is no "
                "class: store classes"
                " as text or integers, or train a regression"
            )
        return str(int(value))

    def _complete(self, texts: list[str | None]) -> list[str]:
        missing = [row for row, text in enumerate(texts) if text is None]
        if missing:
            raise ValueError(
                f"{self.name} is missing in {len(missing)} of {len(texts)} rows of {self.source}, "
                "first in row"
                f" {missing[0] + 1}"
            )
        return [text for text in texts if text is not None]

    def _warn_of_spaces(self, names: set[str]) -> None:
        """Says which classes look the same: they may be one, misspelt in some rows."""
        seen: dict[str, str] = {}
        for name in sorted(names):
            other = seen.setdefault(name.strip(), name)
            if other != name:
                logger.warning(
                    "%s of %s holds %r and %r, which differ in the spaces around them only, and are"
                    " two classes",
                    *(self.name, self.source, other, name),
                )

    def _refuse(self, texts: list[str], numbers: list, legal: str) -> None:
        wrong = [row for row, number in enumerate(numbers) if number is None]
        raise ValueError(
            f"{self.name}={texts[wrong[0]]!r} in row {wrong[0] + 1} of {self.source} ({len(wrong)} "
            "such): expected"
            f" {legal}"
        )


def usual_column(option: str, usual: Sequence[str], columns: Sequence[str], source: str) -> str:
    """The only column that has one of the usual names.

    Args:
        option: the setting that names the column, for the error.
        usual: the names.
        columns: the names that there are.
        source: where they are, for the error.

    Raises:
        ValueError: if there is none, or several of them.
    """
    found = [name for name in usual if name in columns]
    if len(found) > 1:
        raise ValueError(
            f"{option}: {source} has the columns {', '.join(found)}; name the one that is meant"
        )
    if not found:
        raise ValueError(
            f"{option}: none of {tuple(usual)} is in {source}; name one of its columns"
            f" {list(columns)}"
        )
    return found[0]


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(text: str) -> float | None:
    """A finite number in decimal digits, or None. Python's `float` also takes "1_1" and "nan"."""
    text = text.strip()
    if not text.isascii() or not _NUMBER.fullmatch(text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _listed(names: list[str]) -> str:
    more = f", ... ({len(names)} classes)" if len(names) > SHOWN else ""
    return f"({', '.join(map(repr, names[:SHOWN]))}{more})"
