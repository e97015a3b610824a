"""Training of image classifiers: soft targets, distillation, averaged weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback

from ..data.augmentation import RepeatedSampler
from ..data.patch_batches import PatchBudget
from ..data.samples import SeededDataset
from ..linearize.losses import distillation_loss
from ..training.evaluation import loader_options
from ..training.trainer import LionTrainer

AVERAGE_FILE = "ema.safetensors"


class UpdateAverage(TrainerCallback):
    """Moves the average towards the weights after every step."""

    def __init__(self, average: ModelEmaV3):
        self.average = average

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs):
        self.average.update(model, step=state.global_step)


class CheckUnreadable(TrainerCallback):
    """Stops a training when more than a share of its pictures cannot be read.

    Args:
        dataset: the training data, which count what they skip.
        most: the share.
    """

    LEAST = 200  # pictures drawn before the share means something

    def __init__(self, dataset: SeededDataset, most: float):
        self.dataset, self.most, self.drawn = dataset, most, 0
        self.before = dataset.skipped

    def on_step_end(self, args, state, control, **kwargs):
        self.drawn += args.train_batch_size * args.gradient_accumulation_steps
        skipped = self.dataset.skipped - self.before
        if skipped > self.most * max(self.drawn, self.LEAST):
            raise ValueError(
                f"{skipped} of about {self.drawn} training images could not be read, which is more"
                f" than max_unreadable={self.most} allows; the warnings name them"
            )


class ImageTrainer(LionTrainer):
    """`LionTrainer` for image classifiers, with a teacher and an average of the weights.

    The loss is cross-entropy with class probabilities or numbers. With a teacher it is (1 - alpha)
    times this plus alpha times `distillation_loss` (arXiv 2012.12877), on the model's
    `distillation_logits` if it has a head for them, else on its logits. The teacher plays no part
    in evaluation.

    Args:
        teacher: answers the student's pixels with logits.
        distillation: "hard" or "soft".
        alpha: weight of the teacher.
        tau: temperature.
        average_decay: decay of the weights' exponential moving average (EMA), which is evaluated
            too (`eval_ema_...`) and part of the checkpoints; None for no average.
        average_warmup: whether the decay rises from 0, for short trainings.
        max_unreadable: share of training pictures that may be unreadable.
        patch_budget: how many patches of pictures that keep their size are in a batch; None for a
            number of pictures.
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
        max_unreadable: float = 1.0,
        patch_budget: PatchBudget | None = None,
        **kwargs,
    ):
        self.patch_budget = patch_budget
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is computed here, with the right divisor
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        self.distillation, self.alpha, self.tau = distillation, alpha, tau
        self.average, self._pixels = None, None
        if average_decay is not None:
            if self.is_fsdp_enabled:
                raise ValueError(
                    "average_decay with FSDP: expected None (--no_model_ema), because no device has"
                    " all of the weights"
                )
            self.average = ModelEmaV3(self.model, decay=average_decay, use_warmup=average_warmup)
            self.average.requires_grad_(False)
            self.add_callback(UpdateAverage(self.average))
        if isinstance(self.train_dataset, SeededDataset):
            self.add_callback(CheckUnreadable(self.train_dataset, max_unreadable))

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return RepeatedSampler(train_dataset or self.train_dataset)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args, **kwargs
    ) -> DataLoader:
        loader = super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        if self.patch_budget is None or not kwargs.get("is_training", False):
            return loader
        processes = self.args.process_index, self.args.world_size
        order = self._get_train_sampler(dataset)
        batches = self.patch_budget.training(dataset.dataset, order, *processes)
        return DataLoader(
            loader.dataset, batch_sampler=batches, **loader_options(self.args, loader)
        )

    def evaluation_batches(self, dataset: Any, batch_size: int) -> list[list[int]] | None:
        if self.patch_budget is None:
            return super().evaluation_batches(dataset, batch_size)
        return self.patch_budget.evaluation(dataset.dataset)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        self._pixels = inputs["pixel_values"] if model.training else None
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(
        self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
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
        # of soft labels, every class's probability is counted as an item
        per_image = labels.shape[-1] if labels.dim() == 2 else 1
        return losses.sum() * per_image / num_items_in_batch

    # The average of the weights

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with the average as its weights, which it has inside only."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        assert self.average is not None  # asked for only where an average is kept
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
                averaged = super().evaluate(
                    *args, metric_key_prefix=f"{metric_key_prefix}_ema", **kwargs
                )
            metrics |= {
                name: value
                for name, value in averaged.items()
                if not name.endswith(("runtime", "per_second"))
            }
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.average is not None and _internal_call and self.args.should_save:  # a checkpoint
            weights = {
                name: value.contiguous() for name, value in self.average.module.state_dict().items()
            }
            save_file(weights, os.path.join(output_dir or self.args.output_dir, AVERAGE_FILE))

    def saved_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().saved_tensors()
        if self.average is not None:
            for name, value in self.average.module.named_parameters():
                yield f"the average of {name}", value

    def load_weights(self, folder: str | os.PathLike) -> None:
        """As in LionTrainer; the average of a finished run is in its folder ema/."""
        super().load_weights(folder)
        if self.average is not None:
            files = [Path(folder, AVERAGE_FILE), Path(folder, "ema", "model.safetensors")]
            file = next((file for file in files if file.is_file()), None)
            weights = self.model.state_dict() if file is None else load_file(file)
            self.average.module.load_state_dict(weights)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_average(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        if self.average is not None:
            file = os.path.join(checkpoint, AVERAGE_FILE)
            if not os.path.isfile(file):
                raise ValueError(
                    f"{checkpoint} has no {AVERAGE_FILE}: its run had no average of the weights"
                )
            self.average.module.load_state_dict(load_file(file, device=str(self.args.device)))
