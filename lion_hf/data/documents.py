"""Documents to train on: files of text, JSON, CSV or parquet, gzipped or not, or the Hub's data."""

import csv
import glob
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow
from datasets.exceptions import DatasetsError

from .fingerprints import fingerprint
from .tables import check_parquet, long_fields, measure_parquet, rows_below
from .text_files import check_text, check_unpacked, is_empty_file, open_text, text_encoding

LOADERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
LOOKED_AT = 1 << 20  # characters of each file, before anything is read
Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset


def find_files(patterns: Sequence[str]) -> list[str]:
    """The files that names or patterns such as data/*.txt stand for. A name comes first.

    Raises:
        ValueError: for a name or pattern that stands for no file.
    """
    found = []
    for pattern in patterns:
        if Path(pattern).is_file():
            found.append(pattern)
            continue
        if Path(pattern).is_dir():
            raise ValueError(f"{pattern} is a folder: expected files, such as {pattern}/*.txt")
        files = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not files:
            raise ValueError(f"{pattern}: there is no such file")
        found += files
    return found


def read_files(files: Sequence[str], column: str, streaming: bool = False) -> Documents:
    """The documents of files of one kind, in their column.

    Args:
        files: names; `.gz` after the suffix says that a file is packed.
        column: column of the documents; that of text files is "text".
        streaming: whether to read them later, while they are used.

    Raises:
        ValueError: for files of several kinds or of none, files that cannot be read, without the
            column or without text, with rows that do not fit the header, or that become much larger
            in memory than they are. Of a stream, only the beginnings of CSV files are read, and the
            directories of parquet files measured.
    """
    kinds = {LOADERS.get(Path(name.lower().removesuffix(".gz")).suffix) for name in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(
            f"{' '.join(files)}: expected files of one kind among {', '.join(LOADERS)}, also packed"
            " as in .txt.gz"
        )
    (kind,) = kinds
    options: dict[str, Any] = {}
    check_names(files)
    if kind != "parquet":
        files = [name for name in files if _holds_text(name)]
        if not files:
            raise ValueError("all files are empty: expected text")
        options["encoding"] = _encoding(files, kind or "")
        for name in files if not streaming else ():
            check_unpacked(name)
    if kind == "csv":  # text as it stands: no numbers, and "NA" and "null" are words
        most = LOOKED_AT if streaming else None
        with_rows = [name for name in files if _has_rows(name, column, most)]  # checks every file
        if not with_rows:
            raise ValueError(f"{' '.join(files)}: a header without rows: expected text")
        options |= {"usecols": [column], "converters": {column: str}, "na_filter": False}
        options["index_col"] = False  # else a longer row's first field would be its name
    names = [glob.escape(str(Path(name).absolute())) for name in files]
    try:
        for name in files if kind == "parquet" else ():
            check_parquet(name) if streaming else measure_parquet(Path(name))
        # `datasets` knows a file by its time of change; the name also tells its content
        content = hashlib.sha256(json.dumps(fingerprint(files)).encode()).hexdigest()[:16]
        options |= {"name": f"{kind}-{content}", "data_files": names, "split": "train"}
        data = datasets.load_dataset(kind, streaming=streaming, **options)
        return select(data, column)
    except NoColumn:
        raise
    except (DatasetsError, OSError, TypeError, ValueError, pyarrow.ArrowException) as error:
        for name in files if kind != "parquet" else ():
            check_text(name)  # names the line
        raise ValueError(f"{' '.join(files)} cannot be read as {kind}: {reason(error)}") from error


def read_dataset(
    name: str, config: str | None, split: str, column: str, streaming: bool = False
) -> Documents:
    """The documents of a data set on the Hub, or of a folder that `datasets` can read.

    Raises:
        ValueError: if it cannot be had, or lacks the split or the column.
    """
    try:
        data = datasets.load_dataset(name, config, split=split, streaming=streaming)
        return select(data, column)
    except NoColumn:
        raise
    except (DatasetsError, OSError, TypeError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"data set {name} (configuration {config}, split {split}) cannot be read:"
            f" {reason(error)}; check its name and the network"
        ) from error


class NoColumn(ValueError):
    """A table without the column of the documents."""


def select(data: Documents, column: str) -> Documents:
    """A table with only this column.

    Raises:
        NoColumn: if there is no such column.
    """
    columns = data.column_names or list(next(iter(data), {}))
    if column not in columns:
        raise NoColumn(
            f"there is no column {column!r}: the data has {', '.join(columns) or 'none'}"
        )
    return data.select_columns([column])


def reason(error: BaseException) -> str:
    """The innermost cause of an error in one line. Loaders wrap it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def check_names(files: Sequence[str]) -> None:
    """Raises ValueError for names that `datasets` takes for addresses."""
    for name in files:
        packed = name.lower().endswith(".gz")
        if "::" in name or (packed and ("[" in name or "]" in name)):
            signs = "'::', and in those of packed files '[' and ']'" if packed else "'::'"
            raise ValueError(f"{name}: file names must not contain {signs}; rename it")


def _holds_text(name: str) -> bool:
    """Whether a file is not empty, after a check of its beginning."""
    check_text(name, LOOKED_AT)
    return not is_empty_file(name)


def _encoding(files: Sequence[str], kind: str | None) -> str:
    """The encoding of all files; that of UTF-8 with a mark also reads files without."""
    found = {text_encoding(name).removesuffix("-sig") for name in files}
    if len(found) > 1:
        raise ValueError(
            f"{' '.join(files)}: some files are in {', others in '.join(sorted(found))}; convert"
            " all to UTF-8"
        )
    (encoding,) = found
    if encoding == "utf-8":
        return "utf-8-sig"
    if kind == "json":
        raise ValueError(f"{files[0]} is in {encoding.upper()}: JSON is in UTF-8, so convert it")
    return encoding


def _has_rows(name: str, column: str, most: int | None) -> bool:
    """Whether a CSV file has rows, after a check of its header and rows.

    The loader takes rows with more fields than the header, and would cut text at its commas.

    Args:
        name: the file.
        column: column of the documents.
        most: characters to look at, about; None for all.
    """
    try:
        with open_text(name) as file, long_fields():
            reader = csv.reader(file)
            columns = next(reader, [])
            _check_header(name, column, columns)
            has_rows, read = False, 0
            for row in rows_below(columns, reader, name):
                has_rows, read = True, read + sum(map(len, row))
                if most is not None and read >= most:
                    break
    except csv.Error as error:
        raise ValueError(f"{name} cannot be read as csv: {error}") from error
    return has_rows


def _check_header(name: str, column: str, columns: Sequence[str]) -> None:
    """Raises ValueError if a column is missing or not the only one of its name."""
    if column not in columns:
        listed = ", ".join(columns[:20]) or "none"
        raise NoColumn(f"{name} has no column {column!r}: it has {listed}")
    if columns.count(column) > 1:
        raise ValueError(
            f"{name} has {columns.count(column)} columns {column!r}: rename the others"
        )
