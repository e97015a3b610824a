"""Where texts come from: files of any kind, packed or not, or a data set by name."""

import gzip
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset as Table
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from ..convert.errors import ConversionError
from ..data.documents import find_files, reason
from ..data.labelled_text import (
    LABEL_COLUMNS,
    SENTENCE_COLUMNS,
    TextColumns,
    check_columns,
    examples,
)
from ..data.labels import usual_column
from ..data.samples import spread_evenly
from ..data.tables import SUFFIXES, read_table
from ..data.text_files import check_text, check_unpacked, open_text
from ..modeling.configuration_lion import LionConfig
from .settings import VALIDATION_SPLIT, Distillation

TEXT_SUFFIXES = (".txt", ".md", ".text")
PACKED = ".gz"
Rows = Sequence[dict[str, Any]]
HELD_OUT_SHARE = 0.05  # of the training texts, where there are no validation data
LOOKED_AT = 200  # texts that are looked at for words
UNKNOWN_SPLIT = "Unknown split"  # how datasets begins its error


class TextReader:
    """Reads texts as rows with `sentence1`, perhaps `sentence2`, and `labels`.

    Labels that nobody asked for and that are not the model's are left out, with a note.

    Args:
        settings: names of files, data set and columns.
        config: the copy's, which says what the classes are.
        labelled: whether the copy learns from labels of whole texts.
    """

    def __init__(self, settings: Distillation, config: LionConfig, labelled: bool):
        self.settings, self.config, self.labelled = settings, config, labelled
        self.notes: list[str] = []

    def train(self) -> Rows:
        """The rows to learn from."""
        settings = self.settings
        if settings.dataset:
            return self._rows(self._split(settings.train_split), settings.dataset)
        self._check_columns()
        return self._files(settings.train_file or [])

    def validation(self) -> Rows | None:
        """The rows to measure on; None if there are none."""
        settings = self.settings
        if settings.validation_file:
            return self._files(settings.validation_file)
        if not settings.dataset:
            return None
        try:
            table = self._split(settings.validation_split)
        except ConversionError as error:
            if UNKNOWN_SPLIT not in str(error) or settings.validation_split != VALIDATION_SPLIT:
                raise
            return None
        return self._rows(table, settings.dataset)

    def _check_columns(self) -> None:
        """Raises ConversionError if columns are named and no file has any."""
        settings = self.settings
        files = [*(settings.train_file or []), *(settings.validation_file or [])]
        for option in ("text_columns", "label_column"):
            value = getattr(settings, option)
            if value and all(_suffix(name) in TEXT_SUFFIXES for name in find_files(files)):
                raise ConversionError(
                    f"{option}={value!r}: expected none, because plain text has no columns"
                    f" ({', '.join(files)})"
                )

    def _split(self, split: str) -> Table:
        name, config = self.settings.dataset, self.settings.dataset_config
        try:
            return datasets.load_dataset(name, config, split=split)
        except (DatasetsError, OSError, TypeError, ValueError, pyarrow.ArrowException) as error:
            raise ConversionError(
                f"data set {name} (configuration {config}, split {split}) cannot be read:"
                f" {reason(error)}; check its name and the network"
            ) from error

    def _files(self, names: Sequence[str]) -> Rows:
        parts = [self._file(name) for name in find_files(names)]
        if len(parts) == 1:
            return parts[0]
        columns = [sorted(part[0]) for part in parts]
        if any(found != columns[0] for found in columns):
            raise ConversionError(
                f"{' '.join(names)}: expected files with the same columns, but they give"
                f" {' and '.join(map(str, sorted(map(tuple, {tuple(x) for x in columns}))))}"
            )
        return [row for part in parts for row in part]

    def _file(self, name: str) -> Rows:
        packed = name.lower().endswith(PACKED)
        check_unpacked(name)
        suffix = _suffix(name)
        if suffix in TEXT_SUFFIXES:
            return _lines(name)
        if suffix not in SUFFIXES:
            raise ConversionError(
                f"{name}: expected text ({', '.join(TEXT_SUFFIXES)}) or a table"
                f" ({', '.join(SUFFIXES)}), also packed as in .txt.gz"
            )
        if not packed:
            return self._rows(read_table(name), name)
        with tempfile.TemporaryDirectory() as folder:
            unpacked = Path(folder, f"unpacked{suffix}")
            try:
                with gzip.open(name) as source, unpacked.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except (OSError, EOFError) as error:
                raise ConversionError(f"{name} cannot be unpacked: {error}") from error
            return self._rows(read_table(unpacked), name)

    def _rows(self, table: Table, source: str) -> Rows:
        columns, label = self._columns(table, source)
        config, settings = self.config, self.settings
        if self.labelled and label is not None:  # by the names of the classes, or their numbers
            count = config.num_labels
            classes = () if count == 1 else tuple(config.id2label[n] for n in range(count))
            try:
                return examples(table, source, TextColumns(columns, classes, label=label)).data
            except ValueError as error:
                if settings.label_column or settings.alpha < 1:
                    raise
                check_columns(table, source, TextColumns(columns, ()), labelled=False)
                self.notes.append(f"the labels were not used: {error}.")
        rows = examples(table, source, TextColumns(columns, ()), labelled=False).data
        found = [row for row in rows if all(row.values())]
        if not found:
            raise ConversionError(f"{source}: every row of {list(columns)} is empty")
        return found

    def _columns(self, table: Table, source: str) -> tuple[tuple[str, ...], str | None]:
        """The columns of text, and the column of labels or None."""
        names, settings = table.column_names, self.settings
        wanted = [settings.label_column or "", *LABEL_COLUMNS]
        label = next((name for name in wanted if name in names), None)
        if self.labelled and label is not None and settings.label_column is None:
            label = usual_column("label_column", LABEL_COLUMNS, names, source)
        if settings.label_column not in (None, label):
            raise ConversionError(
                f"label_column={settings.label_column!r} is not in {source}: its columns are"
                f" {names}"
            )
        rest = [name for name in names if name != label]
        usual = next((found for found in SENTENCE_COLUMNS if {*found} <= {*names}), None)
        columns = settings.text_columns or usual or (rest if len(rest) == 1 else None)
        if not columns:
            raise ConversionError(
                f"text_columns: which of the columns {names} of {source} hold text is not plain;"
                " name them"
            )
        return tuple(columns), label


def _suffix(name: str) -> str:
    """The suffix of a file, or of what is packed in it."""
    return Path(name.lower().removesuffix(PACKED)).suffix


def _lines(name: str) -> Rows:
    check_text(name)
    with open_text(name) as file:
        rows = [{"sentence1": text} for line in file if (text := line.strip())]
    if not rows:
        raise ConversionError(f"{name}: holds no text")
    return rows


def hold_out(rows: Rows, most: int, runs: int | None = None) -> tuple[Rows, Rows, str]:
    """The rows without some evenly spread ones, these ones, and a note.

    Args:
        rows: those to learn from.
        most: how many are held out at most.
        runs: in how many pieces they follow each other, for documents of several rows; None for
            each by itself.
    """
    length = len(rows)
    if length == 1:
        return rows, rows, "there is a single text: the figures are of what was learnt from."
    count = max(min(round(HELD_OUT_SHARE * length), most), 1)
    size = 1 if runs is None else max(count // runs, 1)
    pieces = count // size
    starts = (n * length // pieces + length // (2 * pieces) - size // 2 for n in range(pieces))
    places = {start + n for start in starts for n in range(size)}
    kept = [row for n, row in enumerate(rows) if n not in places]
    held = [row for n, row in enumerate(rows) if n in places]
    note = f"no validation data were given: {len(held)} of {length} texts were held out."
    return kept, held, note


def name_of(settings: Distillation, files: str = "train_file") -> str:
    """Where the texts come from, for messages.

    Args:
        settings: names of files and data set.
        files: "validation_file" for the texts to measure on.
    """
    return " ".join(getattr(settings, files) or []) or settings.dataset or ""


def check_words(rows: Rows, tokenizer: PreTrainedTokenizerBase, source: str, masked: bool) -> None:
    """Makes sure that the tokenizer knows words of the texts.

    Args:
        rows: of a `TextReader`.
        tokenizer: the source's.
        source: where the texts came from, for the message.
        masked: whether tokens will be masked.

    Raises:
        ConversionError: if it knows none in some evenly spread texts.
    """
    count = min(len(rows), LOOKED_AT)
    special = {*tokenizer.all_special_ids}
    for place in spread_evenly(len(rows), count):
        if not special >= {*tokenizer(rows[place]["sentence1"])["input_ids"]}:
            return
    result = "nothing can be masked" if masked else "nothing can be learnt"
    raise ConversionError(
        f"{source}: the source's tokenizer knows no word of {count} texts that were"
        f" looked at, so {result}: expected text in the source's language"
    )
