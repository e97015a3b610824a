"""LION's entries in the Auto classes of transformers."""

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BertTokenizer,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .image_pipelines import register_pipelines
from .modeling import modeling_lion
from .modeling.configuration_lion import LionConfig
from .modeling.image_processing_lion import LionImageProcessor

# Auto class -> LION class, by name: `register` and the `auto_map` of checkpoints are both made from it.
AUTO_MODELS = {
    "AutoModel": "LionModel",
    "AutoModelForMaskedLM": "LionForMaskedLM",
    "AutoModelForSequenceClassification": "LionForSequenceClassification",
    "AutoModelForTokenClassification": "LionForTokenClassification",
    "AutoModelForQuestionAnswering": "LionForQuestionAnswering",
    "AutoModelForMultipleChoice": "LionForMultipleChoice",
    "AutoModelForImageClassification": "LionForImageClassification",
    "AutoModelForMaskedImageModeling": "LionForMaskedImageModeling",
}


def register() -> None:
    """Registers configuration, models, tokenizer and image processor. Calling it again changes nothing."""
    AutoConfig.register(LionConfig.model_type, LionConfig, exist_ok=True)
    for auto_name, name in AUTO_MODELS.items():
        getattr(transformers, auto_name).register(
            LionConfig, getattr(modeling_lion, name), exist_ok=True
        )
    AutoTokenizer.register(LionConfig, tokenizer_class=BertTokenizer, exist_ok=True)
    AutoImageProcessor.register(
        LionConfig, image_processor_classes={"torchvision": LionImageProcessor}, exist_ok=True
    )
    register_pipelines()


def image_processor(image_size: int | list[int] = 224, crop: float = 0.875) -> LionImageProcessor:
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
    return LionImageProcessor(
        size=size,
        crop_size={"height": height, "width": width},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
