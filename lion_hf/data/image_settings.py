"""Settings of image data: where pictures come from, and how they change. They load no torch."""

from dataclasses import dataclass, field, fields


@dataclass
class ImageSource:
    """Where training and validation pictures come from: one of the first three."""

    data_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder with train/ and val/, validation/ or test/, each with one folder per"
            " class, or with parquet files of these names."
        },
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Name of a data set on the Hub, or its folder."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Parquet file, with --validation_file."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Parquet file, with --train_file."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of --dataset."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of images; by default image or img."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of classes; by default label, labels or fine_label."},
    )


# Fields of `Augmentation` that bring images to one size or mix them. Images that keep their size
# and shape leave them at their defaults.
NEED_ONE_SIZE = ("src", "mixup", "cutmix", "train_interpolation", "eval_crop_ratio")


@dataclass
class Augmentation:
    """To which size images are brought, and how those of training are changed.

    Names and defaults are those of the DeiT recipe's command line (arXiv 2012.12877).
    """

    native_resolution: bool = field(
        default=False,
        metadata={
            "help": "Keep every image's size and shape, rounded to whole patches, in training and"
            " evaluation. Without it all are cropped to one size."
        },
    )
    max_patches: int | None = field(
        default=None,
        metadata={
            "help": "The most patches of an image with --native_resolution; larger images are"
            " scaled down and keep their shape."
        },
    )

    aa: str = field(
        default="rand-m9-mstd0.5-inc1",
        metadata={"help": "RandAugment, AutoAugment or AugMix by timm's name, or none."},
    )
    three_augment: bool = field(
        default=False,
        metadata={
            "help": "3-Augment of DeiT III instead of --aa: grey, solarised or blurred.",
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
        metadata={"help": "Strength of colour jitter if --aa is none or 3-Augment is on."},
    )
    train_interpolation: str = field(
        default="bicubic", metadata={"help": "random, bilinear or bicubic."}
    )
    reprob: float = field(default=0.25, metadata={"help": "Probability of random erasing."})
    remode: str = field(
        default="pixel", metadata={"help": "What erased pixels become: const, rand or pixel."}
    )
    recount: int = field(default=1, metadata={"help": "Rectangles erased per image."})
    repeated_aug: int = field(
        default=3,
        metadata={"help": "How often an image occurs in an epoch; the epoch's length stays."},
    )
    mixup: float | None = field(
        default=None,
        metadata={
            "help": "Alpha of mixup; 0 for none, as with --native_resolution; else 0.8 by default."
        },
    )
    cutmix: float | None = field(
        default=None,
        metadata={
            "help": "Alpha of cutmix; 0 for none, as with --native_resolution; else 1.0 by default."
        },
    )
    mixup_prob: float = field(
        default=1.0, metadata={"help": "Probability that a pair of images is mixed."}
    )
    mixup_switch_prob: float = field(
        default=0.5, metadata={"help": "Probability of cutmix if both are on."}
    )
    smoothing: float = field(default=0.1, metadata={"help": "Label smoothing."})
    eval_crop_ratio: float = field(
        default=0.875,
        metadata={
            "help": "Side of the evaluation crop as a share of the image's.",
            "aliases": ["--crop_pct"],
        },
    )

    def __post_init__(self):
        for name, usual in (("mixup", 0.8), ("cutmix", 1.0)):
            if getattr(self, name) is None:
                setattr(self, name, 0.0 if self.native_resolution else usual)
        self._check_native_resolution()
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

    def _check_native_resolution(self) -> None:
        if self.max_patches is not None and not self.native_resolution:
            raise ValueError(
                f"max_patches={self.max_patches} without native_resolution: expected both, or none"
            )
        if self.max_patches is not None and self.max_patches < 1:
            raise ValueError(f"max_patches={self.max_patches}: expected an integer of at least 1")
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in NEED_ONE_SIZE if self.native_resolution else ():
            legal = 0 if defaults[name] is None else defaults[name]
            if getattr(self, name) != legal:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with native_resolution: expected {legal!r},"
                    " because images keep their size and shape"
                )
