"""Tables from CSV, JSON and parquet files."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import Dataset

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


def read_table(path: str | Path) -> Dataset:
    """Reads a CSV file with a header, JSON lines or a JSON list of objects, or a parquet file. CSV gives strings.

    Raises:
        ValueError: for a missing or empty file, another suffix, or a line that does not fit, by its number.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected a file that ends in one of {SUFFIXES}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        if path.suffix.lower() == ".parquet":
            data = Dataset.from_dict(pyarrow.parquet.read_table(path).to_pydict())
        else:
            text = path.read_text(encoding="utf-8-sig")
            data = Dataset.from_list(
                _csv_rows(text, path) if path.suffix.lower() == ".csv" else _json_rows(text, path)
            )
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
    if len(data) == 0:
        raise ValueError(f"{path}: holds no rows")
    return data


def _csv_rows(text: str, path: Path) -> list[dict[str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, rows = next(reader, []), []
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: two columns have the same name: {header}")
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, but the header has {len(header)}: {header}"
                )
            if row:
                rows.append(dict(zip(header, row)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def _json_rows(text: str, path: Path) -> list[dict]:
    whole = text.lstrip().startswith("[")
    rows = []
    for number, piece in enumerate([text] if whole else text.split("\n"), start=1):
        try:
            rows += (json.loads(piece) if whole else [json.loads(piece)]) if piece.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {error.lineno if whole else number}: {error.msg}"
            ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, row {number}: expected an object with a key a column, not {row!r:.60}"
            )
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]
