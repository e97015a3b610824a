"""From pictures to batches: timm's augmentation, evaluation, mixing, repeated sampling."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp
from torch.utils.data import Sampler
from torchvision import transforms
from transformers import BaseImageProcessor

from ..modeling.image_processing_lion import (
    LONGEST_RATIO,
    MAX_BYTES,
    native_limits,
    native_size,
    patches_of,
)
from .image_settings import Augmentation
from .images import UNKNOWN, open_image
from .samples import SeededDataset, SkippedSample, sample_seed, seeded

logger = logging.getLogger(__name__)


class TrainingTransform:
    """Augments a picture; see `Augmentation`. All randomness is Python's, numpy's and torch's own.

    Args:
        augmentation: says how.
        image_size: height and width in pixels, one integer or a pair. Pictures that keep their
            size and shape are shifted by as much as those of this size.
        processor: its mean, standard deviation, limit of memory and native resolution count.

    Raises:
        ValueError: if timm does not know the augmentation.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        image_size: int | Sequence[int],
        processor: BaseImageProcessor,
    ):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        size = height, width
        name = "3a" if augmentation.three_augment else augmentation.aa
        self.max_bytes = getattr(processor, "max_bytes", MAX_BYTES)
        self.native = native_limits(processor)
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
        for operation in operations(self.augment):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
        if augmentation.src:
            crop = transforms.RandomCrop(
                size, padding=augmentation.src_padding or None, padding_mode="reflect"
            )
            self.augment.transforms[0] = transforms.Compose([ShortestSide(size), crop])
        if self.native is not None:
            self.augment.transforms[0] = WholePatches(*self.native)

    def __call__(self, sample: tuple[Any, int]) -> dict[str, Any]:
        pixels = self.augment(open_image(sample[0], self.max_bytes, self.native))
        row = {"pixel_values": pixels, "labels": sample[1], "training": True}
        if self.native is not None:
            size = self.native[0]
            shape = [side // size for side in pixels.shape[1:]]
            row |= {
                "pixel_values": patches_of(pixels, size),
                "spatial_shapes": torch.tensor([shape]),
            }
        return row


def operations(augment: transforms.Compose) -> Iterator[AugmentOp]:
    """Yields the operations of timm's RandAugment, AutoAugment or AugMix in a transform."""
    for transform in augment.transforms:
        groups = [getattr(transform, "ops", []), *getattr(transform, "policy", [])]
        yield from (operation for group in groups for operation in group)


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """Keeps the upper bits of each channel, at least one.

    At its highest magnitude timm's PosterizeIncreasing asks for no bit at all. Older versions of
    Pillow then returned a black picture, newer ones refuse.
    """
    return ImageOps.posterize(image, min(8, max(1, bits)))


class ShortestSide:
    """Resizes the shortest side of a picture to a square's, or the whole picture to another size.

    Of a long strip only the middle is resized, as in evaluation.
    """

    def __init__(self, size: tuple[int, int]):
        side = min(size) if size[0] == size[1] else size
        self.square = size[0] == size[1]
        self.resize = transforms.Resize(side, transforms.InterpolationMode.BICUBIC)

    def __call__(self, image: Image.Image) -> Image.Image:
        longest = LONGEST_RATIO * min(image.size)
        if self.square and max(image.size) > longest:
            left, top = (max(0, side - longest) // 2 for side in image.size)
            right, bottom = min(image.width, left + longest), min(image.height, top + longest)
            image = image.crop((left, top, right, bottom))
        return self.resize(image)


class WholePatches:
    """Resizes a picture as the image processor does that keeps its size and shape.

    Args:
        patch_size: height and width of a patch in pixels.
        max_patches: the most patches of a picture; None for any number.
    """

    def __init__(self, patch_size: int, max_patches: int | None):
        self.patch_size, self.max_patches = patch_size, max_patches

    def __call__(self, image: Image.Image) -> Image.Image:
        rows, columns = native_size(*image.size, self.patch_size, self.max_patches)
        size = columns * self.patch_size, rows * self.patch_size
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


class EvaluationTransform:
    """What the saved image processor does, so that a pipeline on the saved model sees the same.

    Args:
        processor: the image processor.
        mark_unreadable: turn a picture that cannot be read into one of NaN with the label
            `UNKNOWN`, which losses and figures leave out, and name it in a warning; else raise
            `SkippedSample`.
    """

    def __init__(self, processor: BaseImageProcessor, mark_unreadable: bool = False):
        self.processor, self.mark_unreadable = processor, mark_unreadable
        self.max_bytes = getattr(processor, "max_bytes", MAX_BYTES)
        self.native = native_limits(processor)

    def __call__(self, sample: tuple[Any, int]) -> dict[str, Any]:
        try:
            image = open_image(sample[0], self.max_bytes, self.native)
        except SkippedSample as reason:
            if not self.mark_unreadable:
                raise
            logger.warning("left out: %s", reason)
            return {**self._unreadable(), "labels": UNKNOWN}
        inputs = self.processor(image, return_tensors="pt")
        if self.native is None:
            inputs = {"pixel_values": inputs["pixel_values"][0]}
        return {**inputs, "labels": sample[1]}

    def _unreadable(self) -> dict[str, torch.Tensor]:
        """A picture of NaN, of one patch where pictures keep their size."""
        if self.native is None:
            crop = self.processor.crop_size
            return {"pixel_values": torch.full((3, crop["height"], crop["width"]), torch.nan)}
        pixels = torch.full((1, 3 * self.native[0] ** 2), torch.nan)
        return {"pixel_values": pixels, "spatial_shapes": torch.ones(1, 2, dtype=torch.long)}


class ImageCollator:
    """Makes a batch; training images get smoothed class probabilities as labels and are mixed.

    Two neighbours in the batch are mixed with each other. The random choices come from their own
    seeds: with an even batch size it does not matter over how many processes or accumulation steps
    a batch is spread.

    Args:
        num_classes: number of classes.
        augmentation: says how to mix and smooth.

    Returns (when called with samples):
        `labels`, (B, num_classes) for training, else (B,), and `pixel_values` (B, channels, height,
        width); or, of pictures that keep their size, the patches of all, and `spatial_shapes`.

    Raises:
        ValueError: if pictures of different sizes are to be mixed.
    """

    def __init__(self, num_classes: int, augmentation: Augmentation):
        self.num_classes, self.smoothing = num_classes, augmentation.smoothing
        self.mix = None
        if augmentation.mixup or augmentation.cutmix:
            self.mix = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                prob=augmentation.mixup_prob,
                switch_prob=augmentation.mixup_switch_prob,
                label_smoothing=augmentation.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row["labels"] for row in rows])
        batch = {"labels": labels}  # first, because Trainer asks the first tensor for its rows
        if "spatial_shapes" in rows[0]:
            for name in ("pixel_values", "spatial_shapes"):
                batch[name] = torch.cat([row[name] for row in rows])
        else:
            batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
        if "training" not in rows[0]:
            return batch
        targets = torch.nn.functional.one_hot(labels, self.num_classes).float()
        targets = targets * (1 - self.smoothing) + self.smoothing / self.num_classes
        if self.mix is not None:
            if "spatial_shapes" in batch:
                raise ValueError("mixup and cutmix of images of different sizes: expected 0")
            pixels = batch["pixel_values"]
            for first in range(0, len(rows) - 1, 2):
                pair = slice(first, first + 2)
                with seeded(sample_seed(rows[first]["seed"], rows[first + 1]["seed"])):
                    pixels[pair], targets[pair] = self.mix(pixels[pair], labels[pair])
        return {**batch, "labels": targets}


class RepeatedSampler(Sampler[int]):
    """A random order of a `SeededDataset`, from its seed and epoch, with repeated augmentation.

    With r repeats (arXiv 1901.09335) an epoch is as long as without: a random r-th of the images,
    each r times. Repeats of an image stand near each other, so that they are in one batch, but not
    side by side, because `ImageCollator` mixes neighbours.
    """

    GROUP = 8  # images whose repeats stand together

    def __init__(self, dataset: SeededDataset):
        self.dataset, self.images = dataset, len(dataset) // dataset.repeats

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[int]:
        repeats = self.dataset.repeats
        seed = sample_seed(self.dataset.seed, self.dataset.epoch.item())
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(seed))
        if repeats > 1:
            groups = order[: -(-self.images // repeats)].split(self.GROUP)
            # number of the repeat, by which its choices differ
            shifts = torch.arange(repeats) * self.images
            order = torch.cat(
                [
                    torch.stack([group.roll(-n) + shifts[n] for n in range(repeats)]).flatten()
                    for group in groups
                ]
            )
        return iter(order[: self.images].tolist())
