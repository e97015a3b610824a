"""LION's entries in the Auto classes of transformers."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .image_pipelines import register_pipelines
from .modeling import modeling_lion
from .modeling.configuration_lion import LionConfig
from .modeling.image_processing_lion import LionImageProcessor, check_patches
from .modeling.lion_pretrained import AUTO_MODELS
from .moved import names_that_left


class ExistingBertTokenizer(BertTokenizer):
    """Loads a `BertTokenizer` that exists.

    `BertTokenizer` itself makes up a vocabulary of five words for a folder without one, so that
    `AutoProcessor` would take a folder of an image model for that of a text model.
    """

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *args, **kwargs) -> BertTokenizer:
        """As in `BertTokenizer`.

        Raises:
            OSError: if there is no vocabulary.
        """
        tokenizer = BertTokenizer.from_pretrained(name, *args, **kwargs)
        if not has_words(tokenizer):
            raise OSError(f"{name} has no tokenizer: expected tokenizer.json or vocab.txt")
        return tokenizer


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has any word beside the special ones.

    Where a folder has no tokenizer, transformers makes one up that has none.
    """
    return not set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)


def register() -> None:
    """Registers configuration, models, tokenizer and image processor; it may be called again."""
    AutoConfig.register(LionConfig.model_type, LionConfig, exist_ok=True)
    for auto_name, name in AUTO_MODELS.items():
        getattr(transformers, auto_name).register(
            LionConfig, getattr(modeling_lion, name), exist_ok=True
        )
    AutoTokenizer.register(LionConfig, tokenizer_class=ExistingBertTokenizer, exist_ok=True)
    AutoImageProcessor.register(
        LionConfig, image_processor_classes={"torchvision": LionImageProcessor}, exist_ok=True
    )
    register_pipelines()


def image_processor(
    image_size: int | Sequence[int] = 224, crop: float = 0.875
) -> LionImageProcessor:
    """The evaluation transform of the DeiT recipe (arXiv 2012.12877).

    It resizes with bicubic interpolation, crops the centre, and normalises with ImageNet's mean and
    standard deviation.

    Args:
        image_size: side of the crop in pixels, or its (height, width).
        crop: side of the crop as a share of the side that the image is resized to.

    Raises:
        ValueError: if a side is below 1, or `crop` is not above 0 and at most 1.
    """
    sides = tuple(image_size) if isinstance(image_size, list | tuple) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(
            f"image_size={image_size!r}: expected an integer of at least 1, or a pair of them"
            " (height, width)"
        )
    if not isinstance(crop, int | float) or not 0 < crop <= 1:
        raise ValueError(f"crop={crop!r}: expected a number above 0, at most 1")
    height, width = sides
    square = height == width
    size = (
        {"shortest_edge": round(height / crop)}
        if square
        else {"height": round(height / crop), "width": round(width / crop)}
    )
    return LionImageProcessor(
        size=size,
        crop_size={"height": height, "width": width},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def native_image_processor(
    patch_size: int = 16, max_patches: int | None = None
) -> LionImageProcessor:
    """An image processor for images of different sizes, as they are: no crop, no common size.

    It normalises as `image_processor` does, and returns patches with `spatial_shapes`.

    Args:
        patch_size: of the model, in pixels.
        max_patches: the most patches of an image; larger images are scaled down. None for any
            number.

    Raises:
        ValueError: if a number is below 1.
    """
    check_patches(patch_size, max_patches)
    processor = image_processor()
    processor.native_resolution, processor.patch_size = True, patch_size
    processor.max_patches = max_patches
    return processor


def length_limit(config: Any) -> int | None:
    """The most tokens that a LION text model takes; None for other models."""
    is_lion_text = getattr(config, "model_type", "") == "lion" and config.modality == "text"
    return config.max_position_embeddings if is_lion_text else None


@contextlib.contextmanager
def limit_length(processing_class: Any, config: Any) -> Iterator[None]:
    """While it lasts, a tokenizer's `model_max_length` is at most what the model takes.

    A trained tokenizer has no limit of its own (1e30), with which `truncation=True` cuts nothing.
    Other processors, and tokenizers of other models, are left alone.
    """
    own, limit = getattr(processing_class, "model_max_length", None), length_limit(config)
    if own is None or limit is None or own <= limit:
        yield
        return
    processing_class.model_max_length = limit
    try:
        yield
    finally:
        processing_class.model_max_length = own


__getattr__ = names_that_left(__name__)
