"""Data for image classification: where pictures come from, and which of them count."""

import contextlib
import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..modeling.image_processing_lion import MAX_BYTES, native_size, upright_rgb
from .fingerprints import fingerprint
from .image_settings import ImageSource
from .image_tables import read_parquet_files, read_splits
from .labels import LabelColumn, usual_column
from .samples import SkippedSample

logger = logging.getLogger(__name__)

# Folders, files and splits to evaluate on; the first that is found is taken.
HELD_OUT = ("val", "validation", "test")
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
# Folders that systems and programs leave behind, in small letters, beside those whose names begin
# with a dot.
LEFT_BEHIND = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "@recycle",
    "@__thumb",
    "#recycle",
    "#snapshot",
    "lost+found",
    "$recycle.bin",
    "system volume information",
}
UNKNOWN = -100  # class number of a picture without label; the loss and the figures leave it out
PROBED = 200  # pictures of each part that are read before the training starts


def open_image(
    source: Any, max_bytes: int = MAX_BYTES, native: tuple[int, int | None] | None = None
) -> Image.Image:
    """Reads a picture, upright and in RGB; see `upright_rgb`.

    Args:
        source: a path, encoded bytes, a PIL image, or a row {"bytes": ..., "path": ...}.
        max_bytes: memory that decoding may take.
        native: the patch's size and the most patches of pictures that keep their size and shape,
            which then have to fit (`native_size`).

    Raises:
        SkippedSample: if it cannot be read; the text names the file.
    """
    with _named(source):
        image = _opened(source)
        if native is not None:
            native_size(*image.size, *native)  # before anything is decoded
        return upright_rgb(image, max_bytes, whole=native is not None)


def count_patches(source: Any, native: tuple[int, int | None]) -> int:
    """The patches of a picture that keeps its size and shape, from its header.

    Raises:
        SkippedSample: as `open_image`.
    """
    with _named(source):
        image = _opened(source)
        rows, columns = native_size(*image.size, *native)
        return rows * columns


@contextlib.contextmanager
def _named(source: Any) -> Iterator[None]:
    """Turns every error into a `SkippedSample` that names the file."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        where = source if isinstance(source, str | os.PathLike) else "an image of the table"
        if isinstance(source, dict):
            where = source.get("path") or where
        raise SkippedSample(
            f"{where} cannot be read as an image ({type(error).__name__}: {error})"
        ) from error


def _opened(source: Any) -> Image.Image:
    """The picture, of which only the header has been read."""
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if source is None:
        raise ValueError("it is empty")
    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


class Images(Sequence):
    """Pictures with class numbers; item n is (what `open_image` takes, class number).

    Args:
        images: paths, or rows of a column with encoded images.
        labels: the class number of each, or `UNKNOWN`.
        names: of the classes.
        files: what the pictures are read from, for fingerprints.
    """

    def __init__(
        self,
        images: Sequence,
        labels: Sequence[int] | np.ndarray,
        names: Sequence[str],
        files: Sequence[str] = (),
    ):
        self.images, self.labels = images, np.asarray(labels, dtype=np.int64)
        self.names, self.files = list(names), list(files)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index], int(self.labels[index])

    def in_order_of(self, names: Sequence[str]) -> "Images":
        """The same pictures with the class numbers that these names have.

        Args:
            names: contains every name of the classes that occur.
        """
        numbers = {name: number for number, name in enumerate(names)}
        own = np.array([numbers.get(name, UNKNOWN) for name in self.names])
        labels = np.where(self.labels < 0, UNKNOWN, own[np.maximum(self.labels, 0)])
        return Images(self.images, labels, names, self.files)

    def where(self, index: int) -> str:
        """The path of a picture, or its row in the table."""
        image = self.images[index]
        path = image.get("path") if isinstance(image, dict) else image
        return str(path or f"row {index}")

    def record(self) -> dict[str, Any]:
        """Plain values that change when the pictures or their classes do."""
        labels = hashlib.sha256(self.labels.tobytes()).hexdigest()[:16]
        files = [file for file in self.files if os.access(file, os.R_OK)]  # no broken links
        return {"images": len(self), "labels": labels, "files": fingerprint(files)}

    def describe(self) -> str:
        """The numbers of pictures, in words."""
        counts = Counter(self.labels.tolist())
        least, most = min(counts.values()), max(counts.values())
        return f"{len(self):,} images, {least:,} to {most:,} per class"


def read_source(source: ImageSource, train: bool = True) -> tuple[Images, Images]:
    """Reads paths and labels, not yet the pictures.

    Args:
        source: where they are.
        train: whether training data are needed. If not, and there are none, the data to
            evaluate on are returned twice.

    Raises:
        ValueError: if there are no such data, the classes of the two parts differ, or a label
            is missing or names no class.
    """
    sources = ("data_path", "dataset", "train_file")
    given = [name for name in sources if getattr(source, name)]
    if not train and source.validation_file:
        given = sorted({*given, "train_file"})
    if len(given) != 1 or (train and bool(source.train_file) != bool(source.validation_file)):
        raise ValueError(
            f"data from {given or 'nowhere'}: expected one of --data_path, --dataset, or"
            " --train_file with --validation_file"
        )
    if source.dataset_config and not source.dataset:
        raise ValueError(f"dataset_config={source.dataset_config!r} without dataset")
    if source.data_path:
        return _read_path(source, Path(source.data_path), train)
    if source.dataset:
        return _read_dataset(source, source.dataset, train)
    files = {"validation_file": source.validation_file or "", "train_file": source.train_file or ""}
    if not train:
        files["train_file"] = files["train_file"] or files["validation_file"]
    for name, file in files.items():
        if not Path(file).is_file():
            raise ValueError(f"{name}={file!r}: there is no such file")
    return _read_parquet(source, [files["train_file"]], [files["validation_file"]], train)


def _read_path(source: ImageSource, root: Path, train: bool) -> tuple[Images, Images]:
    if not root.is_dir():
        raise ValueError(f"data_path={source.data_path!r}: there is no such folder")
    held_out = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    check_no_columns(root, image_column=source.image_column, label_column=source.label_column)
    if not train and held_out and not (root / "train").is_dir():
        return read_folders(held_out, held_out)
    if (root / "train").is_dir():
        if held_out is None:
            raise ValueError(
                f"data_path={source.data_path!r}: expected one of {', '.join(HELD_OUT)} beside"
                " train"
            )
        return read_folders(root / "train", held_out)
    found = list(visible_files(root, (".parquet",)))
    files = {
        part: sorted(file for file in found if Path(file).name.startswith(part))
        for part in ("train", *HELD_OUT)
    }
    found_parts = [files[name] for name in HELD_OUT if files[name]]
    if not train and found_parts:
        files["train"] = files["train"] or found_parts[0]
    if not files["train"] or not found_parts:
        raise ValueError(
            f"data_path={source.data_path!r}: expected folders train/ and"
            f" {'/, '.join(HELD_OUT)}/, or parquet files of these names"
        )
    return _read_parquet(source, files["train"], found_parts[0], train)


def check_no_columns(root: Path, **columns: Any) -> None:
    """Raises ValueError if a folder holds folders of images, and columns of a table are named.

    Args:
        root: the folder.
        **columns: what each option names; nothing if it was not given.
    """
    if any((root / part).is_dir() for part in ("train", *HELD_OUT)):
        for name, value in columns.items():
            if value:
                raise ValueError(
                    f"{name}={value!r}: expected none, because folders of images have no columns"
                )


def _read_parquet(
    source: ImageSource, train: list[str], held_out: list[str], training: bool
) -> tuple[Images, Images]:
    read = {", ".join(files): read_parquet_files(files) for files in (train, held_out)}
    tables = [read[", ".join(files)] for files in (train, held_out)]
    return _read_tables(source, tables, list(read), [train, held_out], training)


def _read_dataset(source: ImageSource, path: str, training: bool) -> tuple[Images, Images]:
    tables = read_splits(path, source.dataset_config)
    held_out = next((name for name in HELD_OUT if name in tables), None)
    if not training and held_out:
        tables.setdefault("train", tables[held_out])
    if "train" not in tables or held_out is None:
        raise ValueError(
            f"{path} has splits {sorted(tables)}: expected train and one of {', '.join(HELD_OUT)}"
        )
    parts = [tables["train"], tables[held_out]]
    return _read_tables(source, parts, [path], [[], []], training)


def _read_tables(
    source: ImageSource,
    tables: list[Any],
    places: list[str],
    files: list[list[str]],
    training: bool,
) -> tuple[Images, Images]:
    """The pictures of two tables; `places` are the names of both, or of the two together."""
    import datasets

    columns, where = tables[0].column_names, (places[0], places[-1])
    image_column = _column("image_column", source.image_column, IMAGE_COLUMNS, columns, where[0])
    label_column = _column("label_column", source.label_column, LABEL_COLUMNS, columns, where[0])
    for table, place in zip(tables, where):
        for name in (image_column, label_column):
            if name not in table.column_names:
                raise ValueError(
                    f"column {name!r} is not in {place}: its columns are {table.column_names}"
                )
    labels = [LabelColumn.of(table, label_column, place) for table, place in zip(tables, where)]
    if labels[0].is_real_valued:
        raise ValueError(f"label_column={label_column!r} holds floats: expected classes")
    names = labels[0].classes()
    if training and len(names) < 2:
        raise ValueError(
            f"{label_column}: every row of {where[0]} has the class {names[0]!r}; expected at least"
            " two classes"
        )
    found, by_number = [], isinstance(labels[0].feature, datasets.ClassLabel)
    for table, column, own in zip(tables, labels, files):
        if isinstance(table.features[image_column], datasets.Image):
            table = table.cast_column(image_column, datasets.Image(decode=False))
        found.append(Images(table[image_column], column.numbers(names, by_number), names, own))
    return found[0], found[1]


def read_images(data_path: str | None = None, **source: str | None) -> tuple[Images, Images]:
    """Reads training and validation pictures; the arguments and errors are `ImageSource`'s."""
    return read_source(ImageSource(data_path, **source))


def read_folders(train: Path, held_out: Path) -> tuple[Images, Images]:
    """Reads two folders with one folder per class.

    Hidden folders and files, and what systems leave behind, do not count. Links are followed.

    Raises:
        ValueError: for fewer than two classes, classes of which one part has no folder, a class
            without training pictures, or no pictures at all.
    """
    names, others = class_folders(train), class_folders(held_out)
    if len(names) < 2:
        raise ValueError(f"{train} has {len(names)} class folders: expected at least two")
    if others != names:
        surplus, missing = sorted(set(others) - set(names)), sorted(set(names) - set(others))
        raise ValueError(
            f"class folders differ: {missing} are only in {train}, {surplus} only in {held_out}"
        )
    parts = [_read_classes(root, names) for root in (train, held_out)]
    for root, part in zip((train, held_out), parts):
        present = set(part.labels.tolist())
        empty = [name for number, name in enumerate(names) if number not in present]
        if empty and (root is train or not present):
            raise ValueError(
                f"{root / empty[0]} has no images: expected files ending in"
                f" {', '.join(IMG_EXTENSIONS)}"
            )
        if empty:
            logger.warning("%s has no images of %s", root, ", ".join(empty))
    return parts[0], parts[1]


def read_unlabelled(root: str | os.PathLike, names: Sequence[str]) -> Images:
    """Reads the pictures of a folder to predict; a folder with a class's name labels its own.

    Raises:
        ValueError: if there is no such folder, or no picture in it.
    """
    if not Path(root).is_dir():
        raise ValueError(f"predict_path={str(root)!r}: there is no such folder")
    (files,) = _image_files([Path(root)])
    if not files:
        raise ValueError(f"predict_path={str(root)!r} has no images")
    numbers = {name: number for number, name in enumerate(names)}
    classes = [Path(os.path.relpath(file, root)).parts[0] for file in files]
    return Images(files, [numbers.get(name, UNKNOWN) for name in classes], names, [str(root)])


def class_folders(root: Path) -> list[str]:
    """The names of the folders of classes, in the order of their numbers."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and _counts(entry.name))


def visible_files(
    root: str | os.PathLike, endings: tuple[str, ...], inside: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Yields the files below a folder with one of these endings (in small letters), unsorted.

    Hidden files and folders are left out. Links to folders are followed, but not in circles.

    Args:
        root: the folder.
        endings: such as ".png".
        inside: the real paths of the folders around `root`.
    """
    real = os.path.realpath(root)
    if real in inside:
        return
    for entry in os.scandir(os.fspath(root)):
        if not _counts(entry.name):
            continue
        if entry.is_dir():
            yield from visible_files(entry.path, endings, inside | {real})
        elif entry.name.lower().endswith(endings):
            yield entry.path


def check_readable(
    part: Images,
    title: str,
    most: float,
    max_bytes: int,
    native: tuple[int, int | None] | None = None,
) -> None:
    """Reads some pictures from all over a part, so that unusable data are found before training.

    Args:
        part: the pictures.
        title: what they are, for the message.
        most: share that may be unreadable.
        max_bytes: memory that decoding may take.
        native: as in `open_image`.

    Raises:
        ValueError: if more of them are unreadable.
    """
    places = np.unique(np.linspace(0, len(part) - 1, PROBED).astype(int)).tolist()
    reasons = []
    for place in places:
        try:
            open_image(part.images[place], max_bytes, native)
        except SkippedSample as reason:
            reasons.append(f"{part.where(place)}: {reason}")
    check_share(reasons, len(places), title, most)


def check_share(reasons: Sequence[str], count: int, title: str, most: float) -> None:
    """Raises a ValueError if more than the share `most` of `count` pictures are unreadable."""
    if len(reasons) > most * count:
        raise ValueError(
            f"{len(reasons)} of {count} {title} images cannot be read, which is more than"
            f" max_unreadable={most} allows; the first: {reasons[0]}"
        )


def _read_classes(root: Path, names: Sequence[str]) -> Images:
    found = _image_files([root / name for name in names])
    files = [file for part in found for file in part]
    labels = [number for number, part in enumerate(found) for _ in part]
    return Images(files, labels, names, files)  # nothing else there is part of the data


def _image_files(folders: Sequence[Path]) -> list[list[str]]:
    """The images below each folder, sorted; what ends otherwise is left out with a warning."""
    found = [sorted(visible_files(folder, ("",))) for folder in folders]
    others = Counter(Path(x).suffix for files in found for x in files if not _is_image(x))
    if others:
        kinds = ", ".join(f"{count} {kind or 'without'}" for kind, count in others.items())
        logger.warning("%s: left out by their endings: %s", os.path.commonpath(folders), kinds)
    return [list(filter(_is_image, files)) for files in found]


def _is_image(file: str) -> bool:
    return file.lower().endswith(IMG_EXTENSIONS)


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in LEFT_BEHIND


def _column(
    option: str, name: str | None, usual: tuple[str, ...], columns: list[str], source: str
) -> str:
    if name is None:
        return usual_column(option, usual, columns, source)
    if name not in columns:
        raise ValueError(f"{option}={name!r}: expected one of the columns {columns}")
    return name
