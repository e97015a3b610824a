"""Training of image classifiers: soft targets, distillation from a teacher (arXiv 2012.12877), averaged weights."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback

from .distillation import distillation_loss
from .images import RepeatedSampler
from .trainer import LionTrainer

DISTILLATIONS = ("none", "hard", "soft")
AVERAGE_FILE = "ema.safetensors"


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
        mean, std, student_mean, student_std = (torch.tensor(x)[:, None, None] for x in (mean, std, student_mean, student_std))
        self.register_buffer("scale", student_std / std)
        self.register_buffer("shift", (student_mean - mean) / std)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) for the student's pixels (B, channels, height, width)."""
        pixels = pixel_values * self.scale + self.shift
        if self.image_size is not None and tuple(pixels.shape[2:]) != tuple(self.image_size):
            pixels = F.interpolate(pixels, size=tuple(self.image_size), mode="bicubic", align_corners=False, antialias=True)
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
            raise ValueError(f"teacher_model={name!r} cannot be loaded as a transformers image classifier: {error}") from error
        _check_classes(name, model.config.num_labels, num_labels)
        if hasattr(own, "data_config"):  # timm's wrapper
            mean, std, size = own.data_config["mean"], own.data_config["std"], own.data_config["input_size"][1:]
        else:
            box = getattr(own, "crop_size", None) or own.size
            mean, std, size = own.image_mean, own.image_std, (box.get("height"), box.get("width"))
            size = size if all(size) else None
        return Teacher(model, mean, std, size, *student)
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0)
        raise ValueError(f"teacher_model={name!r}: timm has no such model; did you mean {', '.join(nearest)}?")
    if path is not None and not os.path.isfile(path):
        raise ValueError(f"teacher_path={path!r}: there is no such file")
    if path is None:
        _check_classes(name, timm.get_pretrained_cfg(name).num_classes, num_labels)
    try:
        model = timm.create_model(name, pretrained=path is None, num_classes=num_labels, checkpoint_path=path or "")
    except RuntimeError as error:
        raise ValueError(
            f"teacher_model={name!r} with {num_labels} classes does not fit teacher_path={path!r}: {error}"
        ) from error
    config = timm.data.resolve_model_data_config(model)
    fixed = config["input_size"][1:] if model.pretrained_cfg.get("fixed_input_size") else None
    return Teacher(model, config["mean"], config["std"], fixed, *student)


def _check_classes(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"teacher_model={name!r} has {found} classes: expected the data's {expected}")


class UpdateAverage(TrainerCallback):
    """Moves the average towards the weights after every step."""

    def __init__(self, average: ModelEmaV3):
        self.average = average

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs):
        self.average.update(model, step=state.global_step)


class ImageTrainer(LionTrainer):
    """`LionTrainer` for image classifiers of any kind, with a teacher and an average of the weights.

    The loss is cross-entropy with class probabilities or numbers, and with a teacher (1 - alpha) times this plus alpha times
    `distillation_loss`, on the model's `distillation_logits` if it has a head for them, else on its logits. Evaluation never
    asks the teacher.

    Args:
        teacher: answers the student's pixels with logits.
        distillation: "hard" or "soft".
        alpha: weight of the teacher.
        tau: temperature.
        average_decay: decay of the weights' exponential moving average (EMA), which is evaluated too (`eval_ema_...`) and part
            of the checkpoints; None for no average.
        average_warmup: whether the decay rises from 0, for short trainings.
    """

    def __init__(
        self,
        *args,
        teacher: nn.Module | None = None,
        distillation: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        average_decay: float | None = None,
        average_warmup: bool = False,
        **kwargs,
    ):
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is computed here, with the right divisor
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        self.distillation, self.alpha, self.tau = distillation, alpha, tau
        self.average, self._pixels = None, None
        if average_decay is not None:
            if self.is_fsdp_enabled:
                raise ValueError(
                    "average_decay with FSDP: expected None (--no_model_ema), because no device has all of the weights"
                )
            self.average = ModelEmaV3(self.model, decay=average_decay, use_warmup=average_warmup)
            self.average.requires_grad_(False)
            self.add_callback(UpdateAverage(self.average))

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return RepeatedSampler(train_dataset or self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        self._pixels = inputs["pixel_values"] if model.training else None
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        if self._pixels is not None and self.teacher is not None:
            distilled = outputs.get("distillation_logits")
            student = logits if distilled is None else distilled
            with self.accelerator.autocast():  # Trainer's own covers the student alone
                answers = self.teacher(self._pixels)
            lesson = distillation_loss(student, answers, self.distillation, self.tau)
            losses = (1 - self.alpha) * losses + self.alpha * lesson
        if num_items_in_batch is None:
            return losses.mean()
        return losses.sum() * (labels.shape[-1] if labels.dim() == 2 else 1) / num_items_in_batch  # probabilities are counted

    # The average of the weights

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with the average as its weights, which it has inside only."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average.module.state_dict())
        try:
            yield model
        finally:
            model.load_state_dict(own)

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """As in Trainer; the average is evaluated too."""
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.average is not None:
            with self.averaged():
                averaged = super().evaluate(*args, metric_key_prefix=f"{metric_key_prefix}_ema", **kwargs)
            metrics |= {name: value for name, value in averaged.items() if not name.endswith(("runtime", "per_second"))}
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.average is not None and _internal_call and self.args.should_save:  # a checkpoint
            weights = {name: value.contiguous() for name, value in self.average.module.state_dict().items()}
            save_file(weights, os.path.join(output_dir or self.args.output_dir, AVERAGE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_average(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        if self.average is not None:
            file = os.path.join(checkpoint, AVERAGE_FILE)
            if not os.path.isfile(file):
                raise ValueError(f"{checkpoint} has no {AVERAGE_FILE}: its run had no average of the weights")
            self.average.module.load_state_dict(load_file(file, device=str(self.args.device)))
