"""Tables from CSV, JSON and parquet files, with the types of their columns."""

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset
from datasets.table import InMemoryTable

from .text_files import read_text

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
# What a file may become in memory: so many times its size, and some to spare.
MOST_ENLARGEMENT, SPARE_BYTES = 100, 1 << 28
LONGEST_FIELD = 2**31 - 1  # characters of a CSV field; the module's own limit is 131,072


def read_table(path: str | Path) -> Dataset:
    """Reads a CSV file with a header, JSON lines, a JSON list of objects, or a parquet file.

    Columns of CSV are text; those of JSON and parquet have the file's types, and parquet files that
    `datasets` wrote keep their features, such as the names of a `ClassLabel`.

    Raises:
        ValueError: for a missing, unreadable or empty file, another suffix, or a line that does not
            fit, by its number.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        cure = "; unpack it first" if suffix in (".gz", ".zip", ".zst", ".bz2", ".xz") else ""
        raise ValueError(f"{path}: expected a file that ends in one of {SUFFIXES}{cure}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        data = {".csv": _read_csv, ".parquet": _read_parquet}.get(suffix, _read_json)(path)
    except RecursionError as error:
        raise ValueError(f"{path}: its values are nested too deeply: expected text") from error
    if len(data) == 0:
        raise ValueError(f"{path}: holds no rows")
    return data


def _read_csv(path: Path) -> Dataset:
    lines = io.StringIO(read_text(path), newline="")
    with long_fields():
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: two columns have the same name: {header}")
            rows = list(rows_below(header, reader, path))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return Dataset.from_dict({name: list(values) for name, values in zip(header, zip(*rows))})


def rows_below(header: Sequence[str], reader: Any, path: str | Path) -> Iterator[list[str]]:
    """Yields the rows of a `csv.reader` that has read the header; blank lines are left out.

    Raises:
        ValueError: for a row with more or fewer fields than the header, by its line.
        csv.Error: as the reader.
    """
    for row in reader:
        if row and len(row) != len(header):
            raise ValueError(
                f"{path}, line {reader.line_num}: {len(row)} fields, but the header has"
                f" {len(header)}: {list(header)[:20]}; expected commas between fields, and quotes"
                " around text with commas"
            )
        if row:
            yield row


@contextlib.contextmanager
def long_fields() -> Iterator[None]:
    """Lets the csv module read fields of any length."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_json(path: Path) -> Dataset:
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = _parse(text, f"{path}, line {{}}")
    else:
        pieces = enumerate(re.split(r"\r\n|\n|\r", text), start=1)
        rows = [
            _parse(piece, f"{path}, line {number}") for number, piece in pieces if piece.strip()
        ]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, row {number}: expected an object with one key per column, not {row!r:.60}"
            )
    columns: dict[str, list] = {name: [] for row in rows for name in row}
    count = sum(map(len, rows))
    if len(columns) * len(rows) > MOST_ENLARGEMENT * count + SPARE_BYTES // 8:
        raise ValueError(
            f"{path}: {len(rows):,} rows have {len(columns):,} columns, but only {count:,} values:"
            " expected the same keys in all rows"
        )
    for row in rows:
        for name, values in columns.items():
            values.append(row.get(name))
    return Dataset.from_dict({name: _typed(v, name, path) for name, v in columns.items()})


def _parse(text: str, place: str) -> Any:
    """A value in JSON; `place` may have a gap for the line in the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place.format(error.lineno)}: {error.msg}; expected one object per line, or a list of"
            " objects"
        ) from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise ValueError(f"{place.format(1)}: {error}") from error


def _typed(values: list, name: str, path: Path) -> pyarrow.Array:
    """A column whose values have one type."""
    try:
        return pyarrow.array(values)
    except OverflowError as error:
        raise ValueError(
            f"{path}: column {name!r} has an integer of more than 64 bits; write it as text"
        ) from error
    except (pyarrow.ArrowException, UnicodeError, TypeError) as error:
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        raise ValueError(
            f"{path}: column {name!r} cannot be read as values of one type: it holds"
            f" {', '.join(kinds)} ({error})"
        ) from error


def check_parquet(path: str | Path) -> int:
    """Checks by its directory that a parquet file does not become much larger in memory.

    Returns:
        The bytes that it may take.

    Raises:
        ValueError: if it would take more.
        pyarrow.ArrowException, OSError: if it cannot be read.
    """
    size, needed = Path(path).stat().st_size, 0
    directory = pyarrow.parquet.read_metadata(path)
    for group in map(directory.row_group, range(directory.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            needed += max(
                column.total_uncompressed_size, 8 * max(column.num_values, group.num_rows)
            )
    return _check_needed(needed, MOST_ENLARGEMENT * size + SPARE_BYTES)


def _check_needed(needed: int, most: int) -> int:
    if needed > most:
        raise ValueError(
            f"it unpacks to {needed / 1e6:,.0f} MB or more, over {MOST_ENLARGEMENT} times its"
            " size: write it again with other values, or as several files"
        )
    return most


def measure_parquet(path: Path) -> None:
    """Raises ValueError if the values take more memory than they may.

    The directory does not tell: one long text may stand for all rows.
    """
    most, found = check_parquet(path), 0
    with pyarrow.parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        columns = [group.column(n) for group in groups for n in range(group.num_columns)]
        longest = max((column.total_uncompressed_size for column in columns), default=1)
        rows = min(max(SPARE_BYTES // max(longest, 1), 16), 1 << 16)
        for batch in file.iter_batches(rows):
            found += batch.nbytes
            _check_needed(found, most)


def _read_parquet(path: Path) -> Dataset:
    try:
        measure_parquet(path)
        table = pyarrow.parquet.ParquetFile(path).read()
        index = [name for name in table.column_names if re.fullmatch(r"__index_level_\d+__", name)]
        table = table.drop_columns(index)  # the row names that pandas adds
        for place, field in enumerate(table.schema):
            if pyarrow.types.is_dictionary(field.type):  # what pandas calls a categorical column
                values = table.column(place).cast(field.type.value_type)
                table = table.set_column(place, field.name, values)
        return Dataset(InMemoryTable(table))
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        NotImplementedError,
        pyarrow.ArrowException,
    ) as error:  # of the file, or of the features that its metadata name
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from error
