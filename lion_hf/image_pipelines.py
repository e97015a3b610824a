"""transformers' image pipelines, which open LION's pictures as training does.

The stock pipelines convert a picture to RGB before the image processor sees it. That turns 16-bit
grey into white, and decodes a picture of any size. For models of other families nothing changes,
unless they have LION's image processor, as the softmax models that `lion-hf images` trains.
"""

from typing import Any

import torch
from PIL import Image
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling.configuration_lion import LionConfig
from .modeling.image_processing_lion import (
    LionImageProcessor,
    open_picture,
    reading_limits,
    upright_rgb,
)


class _OpensAsTraining(Pipeline):
    """Gives LION's image processor the picture as it was stored."""

    def preprocess(self, image: Any, timeout: float | None = None, **processor_kwargs) -> Any:
        if not self._reads_as_lion() or isinstance(image, torch.Tensor):
            return super().preprocess(image, timeout=timeout, **processor_kwargs)
        if isinstance(image, str | Image.Image):
            limits = reading_limits(self.image_processor, processor_kwargs)
            image = upright_rgb(open_picture(image, timeout), **limits)
        inputs = self.image_processor(image, return_tensors="pt", **processor_kwargs)
        return inputs.to(self.dtype)

    def _reads_as_lion(self) -> bool:
        """Whether the model is LION's, or was trained on the pictures of LION's processor."""
        processor = type(self.image_processor).__name__  # remote code has a class of its own
        return isinstance(self.model.config, LionConfig) or processor == LionImageProcessor.__name__


class LionImageClassificationPipeline(_OpensAsTraining, ImageClassificationPipeline):
    """`ImageClassificationPipeline`, see `_OpensAsTraining`."""


class LionImageFeatureExtractionPipeline(_OpensAsTraining, ImageFeatureExtractionPipeline):
    """`ImageFeatureExtractionPipeline`, see `_OpensAsTraining`."""

    def _forward(self, model_inputs: Any) -> Any:
        outputs = super()._forward(model_inputs)
        shapes = model_inputs.get("spatial_shapes")
        if shapes is not None and len(shapes) > 1:  # one row of several images
            lengths = (1 + shapes.prod(1)).tolist()
            outputs["last_hidden_state"] = list(outputs.last_hidden_state[0].split(lengths))
        return outputs


PIPELINES = {
    "image-classification": LionImageClassificationPipeline,
    "image-feature-extraction": LionImageFeatureExtractionPipeline,
}


def register_pipelines() -> None:
    """Puts the pipelines in the place of transformers'. Calling it again changes nothing."""
    for task, pipeline in PIPELINES.items():
        PIPELINE_REGISTRY.supported_tasks[task]["impl"] = pipeline
