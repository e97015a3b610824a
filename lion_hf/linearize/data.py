"""Texts and images for distillation, labelled or not."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Subset

from ..convert.errors import ConversionError
from ..data.samples import SeededDataset, SkippedSample, spread_evenly
from ..modeling.configuration_lion import LionConfig
from ..modeling.image_processing_lion import MAX_BYTES
from ..modeling.modeling_lion import LionPreTrainedModel
from .losses import problem_type
from .settings import TRAIN_SPLIT, VALIDATION_SPLIT, Distillation
from .text_data import texts

if TYPE_CHECKING:
    from ..data.images import Images

logger = logging.getLogger(__name__)

MOST_UNREADABLE = 0.01  # share of the images, as `lion-hf images` allows by default
Batch = dict[str, torch.Tensor]
Parts = tuple[SeededDataset, Dataset, Callable[[list], Batch], list[str]]
Found = tuple[SeededDataset, SeededDataset, Callable[[list], Batch], list[str]]


def lesson_data(
    student: LionPreTrainedModel,
    processor: Any,
    settings: Distillation,
    seed: int,
    longest: int | None = None,
) -> Parts:
    """Training data, validation data, what makes batches of them, and notes.

    Where there are no validation texts, a part of the training texts is held out.

    Args:
        student: says which inputs and labels are wanted.
        processor: tokenizer or image processor.
        settings: files and columns.
        seed: of masks.
        longest: tokens that the source takes; as many as the student if not given.

    Raises:
        ValueError: for data that are missing, cannot be read or do not fit the model.
    """
    found: Found = (
        texts(student, processor, settings, seed, longest)
        if student.config.modality == "text"
        else _images(student, processor, settings, seed)
    )
    train, validation, collate, notes = found
    if settings.alpha < 1 and "labels" not in collate([train[0]]):
        reason = "".join(f" ({note.rstrip('.')})" for note in notes if "labels" in note)
        raise ConversionError(
            f"alpha={settings.alpha}: expected 1, because there are no labels that"
            f" {type(student).__name__} learns from{reason}"
        )
    length = len(validation)  # evenly spread, because folders are sorted by class
    count = min(length, settings.validation_samples)
    places = spread_evenly(length, count)
    if student.config.modality == "image":
        places = _readable(validation.dataset, places)  # type: ignore[arg-type]
    return train, Subset(validation, places), collate, notes


def _images(
    student: LionPreTrainedModel, processor: Any, settings: Distillation, seed: int
) -> Found:
    from ..data.augmentation import EvaluationTransform
    from ..data.images import check_no_columns, check_readable, read_images  # with timm

    config = student.config
    _check_image_data(settings)
    columns = {"text_columns": settings.text_columns, "label_column": settings.label_column}
    if settings.data_path:  # by the names of this command; `read_images` has others
        check_no_columns(Path(settings.data_path), **columns)
    if config.num_channels != 3:
        raise ConversionError(
            f"num_channels={config.num_channels}: expected 3 for distillation, which reads images"
            " as RGB"
        )
    train, validation = read_images(
        settings.data_path,
        dataset=settings.dataset,
        dataset_config=settings.dataset_config,
        train_file=_first(settings.train_file),
        validation_file=_first(settings.validation_file),
        image_column=settings.text_columns[0] if settings.text_columns else None,
        label_column=settings.label_column,
    )
    check_readable(train, "training", MOST_UNREADABLE, MAX_BYTES)
    numbers, notes = None, list[str]()
    if (
        type(student).__name__ == "LionForImageClassification"
        and problem_type(student) == "single_label_classification"
    ):
        numbers, notes = _class_numbers(config, train.names)
    collate = ImageBatches(student, numbers)
    transform = EvaluationTransform(processor)
    return (
        SeededDataset(train, transform, seed),
        SeededDataset(validation, transform, seed, vary=False),
        collate,
        notes,
    )


def _first(files: list[str] | None) -> str | None:
    return files[0] if files else None


def _check_image_data(settings: Distillation) -> None:
    """Raises ConversionError for files that cannot hold images, and for what is about texts."""
    if settings.max_length is not None:
        raise ConversionError(
            f"max_length={settings.max_length}: expected none, because the source reads images,"
            " which are read whole"
        )
    if len(settings.text_columns) > 1:
        raise ConversionError(
            f"text_columns={settings.text_columns}: expected one, the column of images"
        )
    for name, usual in (("train_split", TRAIN_SPLIT), ("validation_split", VALIDATION_SPLIT)):
        if getattr(settings, name) != usual:
            raise ConversionError(
                f"{name}={getattr(settings, name)!r}: expected none, because images are read from"
                " the splits that are named train, and val, validation or test"
            )
    for name in ("train_file", "validation_file"):
        files = getattr(settings, name) or []
        if len(files) > 1 or any(not file.lower().endswith(".parquet") for file in files):
            raise ConversionError(
                f"{name}={' '.join(files)}: the source reads images, which needs data_path, dataset"
                " or one parquet file; text cannot teach it"
            )


def _readable(images: "Images", places: list[int]) -> list[int]:
    """The places of the images that can be read; the others must not count as their neighbours.

    Raises:
        ValueError: if more than the share `MOST_UNREADABLE` cannot.
    """
    from ..data.images import check_share, open_image

    found, reasons = [], []
    for place in places:
        try:
            open_image(images.images[place])
            found.append(place)
        except SkippedSample as reason:
            reasons.append(str(reason))
            logger.warning("validation image %d is left out: %s", place, reason)
    check_share(reasons, len(places), "validation", MOST_UNREADABLE)
    return found


def _class_numbers(config: LionConfig, names: list[str]) -> tuple[list[int] | None, list[str]]:
    """The model's number of each class of the data, or None with a note if it lacks one."""
    known = {name: number for number, name in config.id2label.items()}
    by_number = {str(number): number for number in config.id2label}  # as in tables without names
    if set(names) <= by_number.keys() and not set(names) & known.keys():
        known = by_number
    missing = [name for name in names if name not in known]
    if missing:
        return None, [
            f"the data's classes are not the model's ({missing[0]!r} is not among them): their"
            " labels were not used."
        ]
    return [known[name] for name in names], []


class ImageBatches:
    """Makes a batch of images, with labels and masks where the student needs them.

    Args:
        student: the copy.
        numbers: the model's number of each class of the data, or None to leave labels out.
    """

    def __init__(self, student: LionPreTrainedModel, numbers: list[int] | None):
        height, width = student.config.image_height_width
        self.patches = height * width // student.config.patch_size**2
        self.masked = type(student).__name__ == "LionForMaskedImageModeling"
        self.numbers = numbers

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        if self.numbers is not None:
            labels = [row["labels"] for row in rows]
            batch["labels"] = torch.tensor([x if x < 0 else self.numbers[x] for x in labels])
        if self.masked:  # half of the patches, in the same places for the whole batch
            generator = torch.Generator().manual_seed(rows[0]["seed"])
            mask = torch.rand(1, self.patches, generator=generator) < 0.5
            batch["bool_masked_pos"] = mask.expand(len(rows), -1)
        return batch
