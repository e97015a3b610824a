"""LION's entries in the Auto classes of transformers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BitImageProcessor,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .modeling import modeling_lion
from .modeling.configuration_lion import LionConfig
from .modeling.lion_code import AUTO_MODELS


def register() -> None:
    """Registers configuration, models, tokenizer and image processor. Calling it again changes nothing.

    The tokenizer's class is the general one: it fails for a folder without a tokenizer, so that `AutoProcessor`
    goes on to the image processor. (`BertTokenizer` would make up a vocabulary of five words.)
    """
    AutoConfig.register(LionConfig.model_type, LionConfig, exist_ok=True)
    for auto_name, name in AUTO_MODELS.items():
        getattr(transformers, auto_name).register(
            LionConfig, getattr(modeling_lion, name), exist_ok=True
        )
    AutoTokenizer.register(LionConfig, tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    AutoImageProcessor.register(
        LionConfig, image_processor_classes={"torchvision": BitImageProcessor}, exist_ok=True
    )


def image_processor(image_size: int | list[int] = 224, crop: float = 0.875) -> BitImageProcessor:
    """The evaluation transform of the DeiT recipe (arXiv 2012.12877): bicubic, centre crop, ImageNet mean and deviation.

    Args:
        image_size: side of the crop in pixels, or its (height, width).
        crop: side of the crop over the side that the image is resized to.

    Raises:
        ValueError: for a size below 1, or a crop that is no share.
    """
    sides = tuple(image_size) if isinstance(image_size, list | tuple) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(
            f"image_size={image_size!r}: expected an integer of at least 1 or a pair of them (height, width)"
        )
    if not isinstance(crop, int | float) or not 0 < crop <= 1:
        raise ValueError(f"crop={crop!r}: expected a share above 0, at most 1")
    height, width = sides
    square = height == width
    size = (
        {"shortest_edge": round(height / crop)}
        if square
        else {"height": round(height / crop), "width": round(width / crop)}
    )
    return BitImageProcessor(
        size=size,
        crop_size={"height": height, "width": width},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def length_limit(config: Any) -> int | None:
    """The most tokens that a model's position embeddings allow; None if nothing limits them."""
    limited = getattr(config, "modality", "text") == "text" and getattr(
        config, "use_position_embeddings", True
    )
    return getattr(config, "max_position_embeddings", None) if limited else None


@contextlib.contextmanager
def limit_length(processing_class: Any, config: Any) -> Iterator[None]:
    """While it lasts, a tokenizer's `model_max_length` is at most what the model takes; nothing for others.

    A trained tokenizer has no limit of its own (1e30), with which `truncation=True` cuts nothing.
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
