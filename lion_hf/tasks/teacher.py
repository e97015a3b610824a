"""A teacher for image classification: any model of timm or transformers."""

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
)

from ..convert.pickles import StoredTensor
from ..convert.torch_files import open_torch_file
from ..linearize.sources import MOST, check_number, check_parameters, read_json, weight_files
from ..training.finite import not_finite
from .loading import MISSING, in_one_line

logger = logging.getLogger(__name__)

# Where training scripts keep a state dict, the average of the weights first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")


class Teacher(nn.Module):
    """A classifier that sees a student's images, normalised and sized as it is used to.

    Args:
        model: from pixels to logits, or to an output with `logits`.
        mean: of each channel, as the teacher wants it subtracted.
        std: of each channel.
        image_size: height and width that the teacher needs, None for any.
        student_mean: as subtracted in the pixels that come.
        student_std: likewise.
        order: for each class of the student its number in the teacher; None for equal numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: Sequence[int] | None,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        order: Sequence[int] | None = None,
    ):
        super().__init__()
        self.order = None if order is None else list(order)
        self.model, self.image_size = model.eval().requires_grad_(False), image_size
        own_mean, own_std, other_mean, other_std = (
            torch.tensor(x)[:, None, None] for x in (mean, std, student_mean, student_std)
        )
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer("scale", other_std / own_std)
        self.register_buffer("shift", (other_mean - own_mean) / own_std)

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
        logits = outputs if torch.is_tensor(outputs) else outputs.logits
        return logits if self.order is None else logits[:, self.order]


def load_teacher(
    name: str, path: str | None, names: Sequence[str], processor: BaseImageProcessor
) -> Teacher:
    """Loads a teacher by name.

    One of transformers gets images of its own processor's size, one of timm the student's if it
    can take them.

    Args:
        name: of a model of timm, or a transformers folder or Hub name.
        path: file with weights for a timm model, as torch.save or safetensors write them; None for
            timm's own. Nothing in it is executed.
        names: of the student's classes, by number. A teacher must have as many. One of transformers
            that knows the same names in another order answers in this one.
        processor: the student's image processor.

    Raises:
        ValueError: for an unknown name, a file that is missing, holds no weights for the model or
            is not for one of timm, or another number of classes.
    """
    num_labels = len(names)
    student = processor.image_mean, processor.image_std
    if Path(name).is_dir() or "/" in name:
        if path is not None:
            raise ValueError(
                f"teacher_path={path!r} with teacher_model={name!r}: expected none, because the"
                " weights of a transformers model are in its folder"
            )
        return _transformers_teacher(name, names, student)
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0)
        raise ValueError(
            f"teacher_model={name!r}: timm has no such model; did you mean {', '.join(nearest)}?"
        )
    if path is None:
        _check_classes(name, timm.get_pretrained_cfg(name).num_classes, num_labels)
        model = timm.create_model(name, pretrained=True, num_classes=num_labels)
    else:
        weights = read_weights(path)
        model = timm.create_model(name, pretrained=False, num_classes=num_labels)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"teacher_model={name!r} with {num_labels} classes does not fit"
                f" teacher_path={path!r}: {error}"
            ) from error
    config = timm.data.resolve_model_data_config(model)
    fixed = config["input_size"][1:] if model.pretrained_cfg.get("fixed_input_size") else None
    return Teacher(model, config["mean"], config["std"], fixed, *student)


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Reads a state dict without executing anything in the file.

    The average of the weights is taken where a training script of timm or DeiT kept one.

    Raises:
        ValueError: if the file is missing, cannot be read, or holds no weights of finite numbers.
    """
    try:
        read = load_file if Path(path).suffix == ".safetensors" else _read_torch_file
        weights = read(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"teacher_path={str(path)!r} cannot be read as weights: {error}"
        ) from error
    spoilt = not_finite(weights.items())
    if spoilt:
        raise ValueError(f"teacher_path={str(path)!r} holds NaN or infinity in {min(spoilt)}")
    return {_without_prefixes(name): tensor for name, tensor in weights.items()}


def _read_torch_file(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    with open_torch_file(path) as file:
        content = file.content
        for key in WRAPPERS:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
                break
        if not isinstance(content, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, StoredTensor)
            for name, tensor in content.items()
        ):
            raise ValueError(
                "it holds no state dict: expected names with tensors, alone or under one of"
                f" {', '.join(WRAPPERS)}"
            )
        return file.tensors(content)


def _transformers_teacher(
    name: str, names: Sequence[str], student: tuple[Sequence[float], Sequence[float]]
) -> Teacher:
    safe = {"trust_remote_code": False}
    try:
        if Path(name).is_dir():
            _check_size(Path(name))
        model, info = AutoModelForImageClassification.from_pretrained(
            name, output_loading_info=True, **safe
        )
        own = AutoImageProcessor.from_pretrained(name, **safe)
    except MISSING as error:
        raise ValueError(
            f"teacher_model={name!r} cannot be loaded as a transformers image classifier:"
            f" {in_one_line(error)}"
        ) from error
    _check_classes(name, model.config.num_labels, len(names))
    if info["missing_keys"]:
        raise ValueError(
            f"teacher_model={name!r} is not a trained classifier: it lacks"
            f" {sorted(info['missing_keys'])[0]}"
        )
    order = _order(name, [model.config.id2label[n] for n in range(len(names))], names)
    if hasattr(own, "data_config"):  # timm's wrapper
        config = own.data_config
        size = config["input_size"][1:]
        return Teacher(model, config["mean"], config["std"], size, *student, order=order)
    box = getattr(own, "crop_size", None) or own.size
    size = box.get("height"), box.get("width")
    fixed = size if all(size) else None
    return Teacher(model, own.image_mean, own.image_std, fixed, *student, order=order)


def _order(name: str, known: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The teacher's numbers of the student's classes; None if they have the same, or other names.

    ImageNet's folders, for example, have other names than its models.
    """
    if list(known) == list(names):
        return None
    if sorted(known) == sorted(names):
        numbers = {label: number for number, label in enumerate(known)}
        return [numbers[label] for label in names]
    if not all(label == f"LABEL_{number}" for number, label in enumerate(known)):
        logger.warning(
            "the classes of the teacher %s have other names (the first %r) than the data's (%r):"
            " they are taken in the same order",
            name,
            known[0],
            names[0],
        )
    return None


def _check_size(folder: Path) -> None:
    """Raises ValueError if a folder's model needs far more memory than its weights have."""
    content = read_json(folder / "config.json")
    for key, most in MOST.items():
        check_number(key, content.get(key) if isinstance(content, dict) else None, most)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    build = AutoModelForImageClassification.from_config
    check_parameters(config, build, weight_files(folder, folder))


def _check_classes(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"teacher_model={name!r} has {found} classes: expected the data's {expected}"
        )


def _without_prefixes(name: str) -> str:
    """A weight's name without what DistributedDataParallel and torch.compile put before it."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name
