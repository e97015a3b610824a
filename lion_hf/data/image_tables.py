"""Tables of pictures: the splits of a data set on the Hub, and of parquet files."""

import glob
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from .documents import check_names, reason
from .fingerprints import fingerprint
from .tables import check_parquet

# What `datasets` raises for data sets that are missing, broken or unknown to it.
BROKEN = (
    *(DatasetsError, pyarrow.ArrowException, OSError, ValueError, TypeError),
    *(LookupError, AttributeError, NotImplementedError),
)


def read_splits(name: str, config: str | None) -> dict[str, datasets.Dataset]:
    """The splits of a data set on the Hub, or of a folder that `datasets` can read.

    Raises:
        ValueError: if it cannot be had, or as in `read_parquet_files` for a folder with such files.
    """

    def read() -> dict[str, datasets.Dataset]:
        if Path(name).is_dir():  # its files may have classes of their own
            parts = datasets.load_dataset_builder(name, name=config).config.data_files or {}
            files = sorted({str(file) for part in parts.values() for file in part})
            _check_classes([file for file in files if file.lower().endswith(".parquet")])
        return dict(datasets.load_dataset(name, name=config))

    return _read(name, read)


def read_parquet_files(files: Sequence[str]) -> datasets.Dataset:
    """The rows of parquet files, which together are one split.

    Training and validation are read by one call each: of files that are read together, `datasets`
    gives all of them the first one's names of classes, whatever numbers the others have for them.

    Raises:
        ValueError: for a file that cannot be read or would become much larger in memory, and for
            files whose classes have different names or numbers.
    """

    def read() -> datasets.Dataset:
        check_names(files)
        for file in files:
            check_parquet(file)
        # one without rows, the rest of a division, may have types that others do not have
        filled = [file for file in files if pyarrow.parquet.read_metadata(file).num_rows]
        if not filled:
            raise ValueError("there are no rows")
        _check_classes(filled)
        # `datasets` takes names for patterns, and knows a file by its time of change
        names = [glob.escape(str(Path(file).absolute())) for file in filled]
        content = hashlib.sha256(json.dumps(fingerprint(filled)).encode()).hexdigest()[:16]
        options = {"name": f"images-{content}", "data_files": names, "split": "train"}
        return datasets.load_dataset("parquet", **options)

    return _read(", ".join(files), read)


def _check_classes(files: Sequence[str]) -> None:
    """Raises ValueError if a column's numbers do not stand for the same classes in all files.

    Integers without names are numbers of the classes that the other files name.
    """
    first: dict[str, tuple[str, Any]] = {}
    for file in files:
        features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
        for name, kind in features.items():
            if isinstance(kind, datasets.Value) and "int" in kind.dtype:
                continue
            place, other = first.setdefault(name, (file, kind))
            if kind != other and datasets.ClassLabel in (type(kind), type(other)):
                raise ValueError(
                    f"the classes in column {name!r} of {file} are not those of {place}, or are"
                    " in another order: write both with the same ones"
                )


def _read(where: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except BROKEN as error:
        raise ValueError(f"{where} cannot be read as images: {reason(error)}") from error
