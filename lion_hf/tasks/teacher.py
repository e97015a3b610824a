"""A teacher for image classification: any model of timm or transformers."""

import difflib
import os
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification


class Teacher(nn.Module):
    """A classifier of timm or transformers that sees a student's images, normalised and sized as it is used to.

    Args:
        model: from pixels to logits, or to an output with `logits`.
        mean: of each channel, as the teacher wants it subtracted.
        std: of each channel.
        image_size: height and width that the teacher needs, None for any.
        student_mean: as subtracted in the pixels that come.
        student_std: likewise.
    """

    def __init__(self, model: nn.Module, mean, std, image_size, student_mean, student_std):
        super().__init__()
        self.model, self.image_size = model.eval().requires_grad_(False), image_size
        mean, std, student_mean, student_std = (
            torch.tensor(x)[:, None, None] for x in (mean, std, student_mean, student_std)
        )
        self.register_buffer("scale", student_std / std)
        self.register_buffer("shift", (student_mean - mean) / std)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) for the student's pixels (B, channels, height, width)."""
        pixels = pixel_values * self.scale + self.shift
        if self.image_size is not None and tuple(pixels.shape[2:]) != tuple(self.image_size):
            pixels = F.interpolate(
                pixels,
                size=tuple(self.image_size),
                mode="bicubic",
                align_corners=False,
                antialias=True,
            )
        outputs = self.model(pixels)
        return outputs if torch.is_tensor(outputs) else outputs.logits


def load_teacher(name: str, path: str | None, num_labels: int, processor) -> Teacher:
    """A teacher by name. One of transformers gets images of its processor's size, one of timm the student's, if it can.

    Args:
        name: of a model of timm, or a transformers folder or Hub name.
        path: file with weights for a timm model; None for timm's own.
        num_labels: classes that it must have.
        processor: the student's image processor.

    Raises:
        ValueError: for an unknown name, a missing file, or another number of classes.
    """
    student = processor.image_mean, processor.image_std
    if Path(name).is_dir() or "/" in name:
        try:
            safe = {"trust_remote_code": False}
            model = AutoModelForImageClassification.from_pretrained(name, **safe)
            own = AutoImageProcessor.from_pretrained(name, **safe)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"teacher_model={name!r} cannot be loaded as a transformers image classifier: {error}"
            ) from error
        _check_classes(name, model.config.num_labels, num_labels)
        if hasattr(own, "data_config"):  # timm's wrapper
            mean, std, size = (
                own.data_config["mean"],
                own.data_config["std"],
                own.data_config["input_size"][1:],
            )
        else:
            box = getattr(own, "crop_size", None) or own.size
            mean, std, size = own.image_mean, own.image_std, (box.get("height"), box.get("width"))
            size = size if all(size) else None
        return Teacher(model, mean, std, size, *student)
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0)
        raise ValueError(
            f"teacher_model={name!r}: timm has no such model; did you mean {', '.join(nearest)}?"
        )
    if path is not None and not os.path.isfile(path):
        raise ValueError(f"teacher_path={path!r}: there is no such file")
    if path is None:
        _check_classes(name, timm.get_pretrained_cfg(name).num_classes, num_labels)
    try:
        model = timm.create_model(
            name, pretrained=path is None, num_classes=num_labels, checkpoint_path=path or ""
        )
    except RuntimeError as error:
        raise ValueError(
            f"teacher_model={name!r} with {num_labels} classes does not fit teacher_path={path!r}: {error}"
        ) from error
    config = timm.data.resolve_model_data_config(model)
    fixed = config["input_size"][1:] if model.pretrained_cfg.get("fixed_input_size") else None
    return Teacher(model, config["mean"], config["std"], fixed, *student)


def _check_classes(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"teacher_model={name!r} has {found} classes: expected the data's {expected}"
        )
