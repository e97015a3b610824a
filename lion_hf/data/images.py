"""Data for image classification: where images come from, the DeiT recipe's augmentation with timm's parts, mixing, order."""

import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from .samples import SkippedSample

HELD_OUT = (
    "val",
    "validation",
    "test",
)  # names of folders, files and splits to evaluate on, the first found is taken
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")


# Where images come from. A source is a sequence of (what `open_image` takes, class number).


class Images(Sequence):
    """Images and class numbers.

    Args:
        images: paths, or rows of a column with encoded images.
        labels: a class number for each.
        names: of the classes.
    """

    def __init__(self, images: Sequence, labels: Sequence[int], names: list[str]):
        self.images, self.labels, self.names = images, labels, names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], int(self.labels[index])


def open_image(source: Any) -> Image.Image:
    """An RGB image from a path, encoded bytes, or a row `{"bytes", "path"}`; `SkippedSample` if it cannot be read."""
    where = source if isinstance(source, str | os.PathLike) else "an image of the table"
    try:
        if isinstance(source, Image.Image):
            image = source
        else:
            if isinstance(source, dict):
                where = source.get("path") or where
                source = source["path"] if source.get("bytes") is None else source["bytes"]
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
            image = Image.fromarray(
                (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            )
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise SkippedSample(
            f"{where} cannot be read as an image ({type(error).__name__}: {error})"
        ) from error


def read_images(
    data_path: str | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[Images, Images]:
    """Training and validation images from a folder of class folders, parquet files or a data set on the Hub.

    Args:
        data_path: folder with train/ and val/, validation/ or test/, each with one folder a class, or with parquet files whose
            names begin so.
        dataset: of a data set on the Hub, or its folder.
        dataset_config: its configuration.
        train_file: parquet file, with `validation_file`.
        validation_file: likewise.
        image_column: of a table; None for "image" or "img".
        label_column: of a table; None for "label" or "labels".

    Raises:
        ValueError: if there are no such data, or classes of the two parts differ, or a label is outside of the classes.
    """
    sources = {"data_path": data_path, "dataset": dataset, "train_file": train_file}
    given = [name for name, source in sources.items() if source]
    if len(given) != 1 or bool(train_file) != bool(validation_file):
        raise ValueError(
            f"data from {given or 'nowhere'}: expected one of --data_path, --dataset, or --train_file with --validation_file"
        )
    if data_path:
        root = Path(data_path)
        if not root.is_dir():
            raise ValueError(f"data_path={data_path!r}: there is no such folder")
        if (root / "train").is_dir():
            held_out = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
            if held_out is None:
                raise ValueError(
                    f"data_path={data_path!r}: beside train/ one of {', '.join(HELD_OUT)} is expected"
                )
            return _read_folders(root / "train", held_out)
        files = {
            name: sorted(map(str, root.rglob(f"{name}*.parquet"))) for name in ("train", *HELD_OUT)
        }
        held_out = next((files[name] for name in HELD_OUT if files[name]), None)
        if not files["train"] or held_out is None:
            raise ValueError(
                f"data_path={data_path!r}: expected folders train/ and {'/, '.join(HELD_OUT)}/, or parquet files of these names"
            )
        return _read_tables(
            "parquet",
            {"data_files": {"train": files["train"], "test": held_out}},
            image_column,
            label_column,
        )
    if train_file:
        for name, file in (("train_file", train_file), ("validation_file", validation_file)):
            if not Path(file).is_file():
                raise ValueError(f"{name}={file!r}: there is no such file")
        files = {"data_files": {"train": train_file, "test": validation_file}}
        return _read_tables("parquet", files, image_column, label_column)
    return _read_tables(dataset, {"name": dataset_config}, image_column, label_column)


def _read_folders(train: Path, held_out: Path) -> tuple[Images, Images]:
    names = sorted(folder.name for folder in train.iterdir() if folder.is_dir())
    others = sorted(folder.name for folder in held_out.iterdir() if folder.is_dir())
    if len(names) < 2:
        raise ValueError(f"{train} has {len(names)} class folders: expected at least two")
    if others != names:
        surplus, missing = sorted(set(others) - set(names)), sorted(set(names) - set(others))
        raise ValueError(
            f"class folders differ: {missing} are only in {train}, {surplus} only in {held_out}"
        )
    parts = []
    for root in (train, held_out):
        files, labels = [], []
        for number, name in enumerate(names):
            found = sorted(
                str(file)
                for file in (root / name).rglob("*")
                if file.name.lower().endswith(IMG_EXTENSIONS)
            )
            if not found and root is train:
                raise ValueError(
                    f"{root / name} has no images: expected files ending in {', '.join(IMG_EXTENSIONS)}"
                )
            files, labels = files + found, labels + [number] * len(found)
        if not files:
            raise ValueError(
                f"{root} has no images: expected files ending in {', '.join(IMG_EXTENSIONS)}"
            )
        parts.append(Images(files, labels, names))
    return parts[0], parts[1]


def _read_tables(
    path: str, kwargs: dict, image_column: str | None, label_column: str | None
) -> tuple[Images, Images]:
    import datasets

    tables = datasets.load_dataset(path, **kwargs)
    held_out = next((name for name in HELD_OUT if name in tables), None)
    if "train" not in tables or held_out is None:
        raise ValueError(
            f"{path} has splits {sorted(tables)}: expected train and one of {', '.join(HELD_OUT)}"
        )
    columns = tables["train"].column_names
    image_column = _column("image_column", image_column, IMAGE_COLUMNS, columns)
    label_column = _column("label_column", label_column, LABEL_COLUMNS, columns)
    feature = tables["train"].features[label_column]
    labels = [np.asarray(tables[name][label_column][:]) for name in ("train", held_out)]
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    elif labels[0].dtype.kind in "iu":
        names = [str(number) for number in range(int(labels[0].max()) + 1)]
    elif labels[0].dtype.kind in "US":
        names = sorted(set(labels[0].tolist()))
        numbers = {name: number for number, name in enumerate(names)}
        labels = [np.array([numbers.get(name, -1) for name in part.tolist()]) for part in labels]
    else:
        raise ValueError(
            f"label_column={label_column!r} holds {labels[0].dtype}: expected class numbers or names"
        )
    parts = []
    for part, name in zip(labels, ("train", held_out)):
        wrong = np.flatnonzero((part < 0) | (part >= len(names)))
        if len(wrong):
            label = tables[name][int(wrong[0])][label_column]
            raise ValueError(
                f"row {wrong[0]} of {name} has label {label!r}: expected one of the {len(names)} classes of the training data;"
                f" {len(wrong)} rows are so"
            )
        table = tables[name]
        if isinstance(table.features[image_column], datasets.Image):
            table = table.cast_column(image_column, datasets.Image(decode=False))
        parts.append(Images(table[image_column], part, names))
    return parts[0], parts[1]


def _column(option: str, name: str | None, usual: tuple[str, ...], columns: list[str]) -> str:
    found = next((column for column in ([name] if name else usual) if column in columns), None)
    if found is None:
        raise ValueError(f"{option}={name!r}: expected one of the columns {columns}")
    return found


def describe(part: Images) -> str:
    """Numbers of images of the data, in words."""
    counts = Counter(map(int, part.labels))
    return f"{len(part):,} images, {min(counts.values()):,} to {max(counts.values()):,} a class"
