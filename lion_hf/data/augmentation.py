"""From images to batches: augmentation, evaluation, mixing, repeated sampling."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import Mixup, create_transform
from torch.utils.data import Sampler
from torchvision import transforms
from transformers import BaseImageProcessor

from .images import open_image
from .samples import SeededDataset, sample_seed, seeded


@dataclass
class Augmentation:
    """How training images are changed; the defaults are the DeiT recipe's (arXiv 2012.12877), in its command line's words."""

    aa: str = field(
        default="rand-m9-mstd0.5-inc1",
        metadata={"help": "timm's name of a RandAugment or AutoAugment, or none."},
    )
    three_augment: bool = field(
        default=False,
        metadata={
            "help": "3-Augment of DeiT III in place of --aa: grey, solarised or blurred.",
            "aliases": ["--ThreeAugment"],
        },
    )
    src: bool = field(
        default=False,
        metadata={"help": "Simple random crop: a shift by up to --src_padding pixels, no zoom."},
    )
    src_padding: int = field(default=4, metadata={"help": "Pixels of reflected border for --src."})
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    color_jitter: float = field(
        default=0.3,
        metadata={"help": "Strength of colour jitter, where --aa is none or 3-Augment is on."},
    )
    train_interpolation: str = field(
        default="bicubic", metadata={"help": "random, bilinear or bicubic."}
    )
    reprob: float = field(default=0.25, metadata={"help": "Probability of random erasing."})
    remode: str = field(
        default="pixel", metadata={"help": "What erased pixels become: const, rand or pixel."}
    )
    recount: int = field(default=1, metadata={"help": "Rectangles erased in an image."})
    repeated_aug: int = field(
        default=3,
        metadata={"help": "Times that an image of an epoch occurs; an epoch stays as long."},
    )
    mixup: float = field(default=0.8, metadata={"help": "Alpha of mixup; 0 for none."})
    cutmix: float = field(default=1.0, metadata={"help": "Alpha of cutmix; 0 for none."})
    mixup_prob: float = field(
        default=1.0, metadata={"help": "Probability that a pair of images is mixed."}
    )
    mixup_switch_prob: float = field(
        default=0.5, metadata={"help": "Probability of cutmix where both are on."}
    )
    smoothing: float = field(default=0.1, metadata={"help": "Label smoothing."})
    eval_crop_ratio: float = field(
        default=0.875,
        metadata={
            "help": "Side of the evaluation crop over that of the image.",
            "aliases": ["--crop_pct"],
        },
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


# From images to batches


class TrainingTransform:
    """Augments an image; see `Augmentation`. All randomness is Python's, numpy's and torch's global one."""

    def __init__(
        self, augmentation: Augmentation, image_size: int | list[int], processor: BaseImageProcessor
    ):
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
            resize = transforms.Resize(
                min(size) if size[0] == size[1] else size, transforms.InterpolationMode.BICUBIC
            )
            crop = transforms.RandomCrop(
                size, padding=augmentation.src_padding or None, padding_mode="reflect"
            )
            self.augment.transforms[0] = transforms.Compose([resize, crop])

    def __call__(self, sample: tuple[Any, int]) -> dict[str, Any]:
        return {
            "pixel_values": self.augment(open_image(sample[0])),
            "labels": sample[1],
            "training": True,
        }


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
        pixels, labels = (
            torch.stack([row["pixel_values"] for row in rows]),
            torch.tensor([row["labels"] for row in rows]),
        )
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
        repeats, seed = (
            self.dataset.repeats,
            sample_seed(self.dataset.seed, self.dataset.epoch.item()),
        )
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(seed))
        if repeats > 1:
            groups = order[: -(-self.images // repeats)].split(self.GROUP)
            shifts = (
                torch.arange(repeats) * self.images
            )  # number of the repeat, by which its choices differ
            order = torch.cat(
                [
                    torch.stack([group.roll(-n) + shifts[n] for n in range(repeats)]).flatten()
                    for group in groups
                ]
            )
        return iter(order[: self.images].tolist())
