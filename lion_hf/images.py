"""Data for image classification: where images come from, the DeiT recipe's augmentation with timm's parts, mixing, order."""

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torch.utils.data import Sampler
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from transformers import BaseImageProcessor

from .data import SeededDataset, SkippedSample, sample_seed, seeded

HELD_OUT = ("val", "validation", "test")  # names of folders, files and splits to evaluate on, the first found is taken
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")


@dataclass
class Augmentation:
    """How training images are changed; the defaults are the DeiT recipe's (arXiv 2012.12877), in its command line's words."""

    aa: str = field(default="rand-m9-mstd0.5-inc1", metadata={"help": "timm's name of a RandAugment or AutoAugment, or none."})
    three_augment: bool = field(
        default=False,
        metadata={"help": "3-Augment of DeiT III in place of --aa: grey, solarised or blurred.", "aliases": ["--ThreeAugment"]},
    )
    src: bool = field(default=False, metadata={"help": "Simple random crop: a shift by up to --src_padding pixels, no zoom."})
    src_padding: int = field(default=4, metadata={"help": "Pixels of reflected border for --src."})
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    color_jitter: float = field(
        default=0.3, metadata={"help": "Strength of colour jitter, where --aa is none or 3-Augment is on."}
    )
    train_interpolation: str = field(default="bicubic", metadata={"help": "random, bilinear or bicubic."})
    reprob: float = field(default=0.25, metadata={"help": "Probability of random erasing."})
    remode: str = field(default="pixel", metadata={"help": "What erased pixels become: const, rand or pixel."})
    recount: int = field(default=1, metadata={"help": "Rectangles erased in an image."})
    repeated_aug: int = field(default=3, metadata={"help": "Times that an image of an epoch occurs; an epoch stays as long."})
    mixup: float = field(default=0.8, metadata={"help": "Alpha of mixup; 0 for none."})
    cutmix: float = field(default=1.0, metadata={"help": "Alpha of cutmix; 0 for none."})
    mixup_prob: float = field(default=1.0, metadata={"help": "Probability that a pair of images is mixed."})
    mixup_switch_prob: float = field(default=0.5, metadata={"help": "Probability of cutmix where both are on."})
    smoothing: float = field(default=0.1, metadata={"help": "Label smoothing."})
    eval_crop_ratio: float = field(
        default=0.875, metadata={"help": "Side of the evaluation crop over that of the image.", "aliases": ["--crop_pct"]}
    )

    def __post_init__(self):
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a probability in [0, 1]")
        for name in ("src_padding", "color_jitter", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number of at least 0")
        for name, legal in (
            ("train_interpolation", ("random", "bilinear", "bicubic")),
            ("remode", ("const", "rand", "pixel")),
        ):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {legal}")
        for name in ("repeated_aug", "recount"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 1")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing}: expected a number in [0, 1)")
        if not 0 < self.eval_crop_ratio <= 1:
            raise ValueError(f"eval_crop_ratio={self.eval_crop_ratio}: expected a number in (0, 1]")


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
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise SkippedSample(f"{where} cannot be read as an image ({type(error).__name__}: {error})") from error


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
                raise ValueError(f"data_path={data_path!r}: beside train/ one of {', '.join(HELD_OUT)} is expected")
            return _read_folders(root / "train", held_out)
        files = {name: sorted(map(str, root.rglob(f"{name}*.parquet"))) for name in ("train", *HELD_OUT)}
        held_out = next((files[name] for name in HELD_OUT if files[name]), None)
        if not files["train"] or held_out is None:
            raise ValueError(
                f"data_path={data_path!r}: expected folders train/ and {'/, '.join(HELD_OUT)}/, or parquet files of these names"
            )
        return _read_tables("parquet", {"data_files": {"train": files["train"], "test": held_out}}, image_column, label_column)
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
        raise ValueError(f"class folders differ: {missing} are only in {train}, {surplus} only in {held_out}")
    parts = []
    for root in (train, held_out):
        files, labels = [], []
        for number, name in enumerate(names):
            found = sorted(str(file) for file in (root / name).rglob("*") if file.name.lower().endswith(IMG_EXTENSIONS))
            if not found and root is train:
                raise ValueError(f"{root / name} has no images: expected files ending in {', '.join(IMG_EXTENSIONS)}")
            files, labels = files + found, labels + [number] * len(found)
        if not files:
            raise ValueError(f"{root} has no images: expected files ending in {', '.join(IMG_EXTENSIONS)}")
        parts.append(Images(files, labels, names))
    return parts[0], parts[1]


def _read_tables(path: str, kwargs: dict, image_column: str | None, label_column: str | None) -> tuple[Images, Images]:
    import datasets

    tables = datasets.load_dataset(path, **kwargs)
    held_out = next((name for name in HELD_OUT if name in tables), None)
    if "train" not in tables or held_out is None:
        raise ValueError(f"{path} has splits {sorted(tables)}: expected train and one of {', '.join(HELD_OUT)}")
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
        raise ValueError(f"label_column={label_column!r} holds {labels[0].dtype}: expected class numbers or names")
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


# From images to batches


class TrainingTransform:
    """Augments an image; see `Augmentation`. All randomness is Python's, numpy's and torch's global one."""

    def __init__(self, augmentation: Augmentation, image_size: int | list[int], processor: BaseImageProcessor):
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        name = "3a" if augmentation.three_augment else augmentation.aa
        try:
            self.augment = create_transform(
                size,
                is_training=True,
                hflip=augmentation.hflip,
                color_jitter=augmentation.color_jitter or None,
                auto_augment=None if name.lower() == "none" else name,
                interpolation=augmentation.train_interpolation,
                mean=tuple(processor.image_mean),
                std=tuple(processor.image_std),
                re_prob=augmentation.reprob,
                re_mode=augmentation.remode,
                re_count=augmentation.recount,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(f"aa={name!r}: timm knows no such augmentation ({error})") from error
        if augmentation.src:
            resize = transforms.Resize(min(size) if size[0] == size[1] else size, transforms.InterpolationMode.BICUBIC)
            crop = transforms.RandomCrop(size, padding=augmentation.src_padding or None, padding_mode="reflect")
            self.augment.transforms[0] = transforms.Compose([resize, crop])

    def __call__(self, sample: tuple[Any, int]) -> dict[str, Any]:
        return {"pixel_values": self.augment(open_image(sample[0])), "labels": sample[1], "training": True}


class EvaluationTransform:
    """What the saved image processor does, so that a pipeline on the saved model sees the same pixels."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, sample: tuple[Any, int]) -> dict[str, Any]:
        pixels = self.processor(open_image(sample[0]), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": sample[1]}


class ImageCollator:
    """A batch of images; training images get class probabilities as labels, smoothed, and are mixed in pairs.

    Neighbours in the batch make a pair, whose random choices come from their own seeds: with an even batch size it does not
    matter over how many processes or accumulation steps a batch is spread.

    Args:
        num_classes: number of classes.
        augmentation: says how to mix and smooth.

    Returns (when called with samples):
        `pixel_values` (B, channels, height, width) and `labels`, (B, num_classes) for training, else (B,).
    """

    def __init__(self, num_classes: int, augmentation: Augmentation):
        self.num_classes, self.smoothing = num_classes, augmentation.smoothing
        self.mix = None
        if augmentation.mixup > 0 or augmentation.cutmix > 0:
            self.mix = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                prob=augmentation.mixup_prob,
                switch_prob=augmentation.mixup_switch_prob,
                label_smoothing=augmentation.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels, labels = torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])
        if "training" not in rows[0]:
            return {"pixel_values": pixels, "labels": labels}
        targets = torch.nn.functional.one_hot(labels, self.num_classes).float()
        targets = targets * (1 - self.smoothing) + self.smoothing / self.num_classes
        if self.mix is not None:
            for first in range(0, len(rows) - 1, 2):
                pair = slice(first, first + 2)
                with seeded(sample_seed(rows[first]["seed"], rows[first + 1]["seed"])):
                    pixels[pair], targets[pair] = self.mix(pixels[pair], labels[pair])
        return {"pixel_values": pixels, "labels": targets}


class RepeatedSampler(Sampler[int]):
    """A random order of a `SeededDataset` by its seed and epoch, with repeated augmentation (arXiv 1901.09335).

    With r repeats an epoch is as long as without: a random r-th of the images, each r times. Repeats of an image stand near
    each other, so that they are in one batch, but not as neighbours, which `ImageCollator` mixes.
    """

    GROUP = 8  # images whose repeats stand together

    def __init__(self, dataset: SeededDataset):
        self.dataset, self.images = dataset, len(dataset) // dataset.repeats

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[int]:
        repeats, seed = self.dataset.repeats, sample_seed(self.dataset.seed, self.dataset.epoch.item())
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(seed))
        if repeats > 1:
            groups = order[: -(-self.images // repeats)].split(self.GROUP)
            shifts = torch.arange(repeats) * self.images  # number of the repeat, by which its choices differ
            order = torch.cat([torch.stack([group.roll(-n) + shifts[n] for n in range(repeats)]).flatten() for group in groups])
        return iter(order[: self.images].tolist())


def describe(part: Images) -> str:
    """Numbers of images of the data, in words."""
    counts = Counter(map(int, part.labels))
    return f"{len(part):,} images, {min(counts.values()):,} to {max(counts.values()):,} a class"
