"""Arguments of a run of `lion-hf images`."""

from dataclasses import dataclass
from typing import ClassVar

from ..training.arguments import LionTrainingArguments
from .image_settings import ImageRunOptions


@dataclass
class ImageTrainingArguments(ImageRunOptions, LionTrainingArguments):
    """`LionTrainingArguments` with the names and defaults of the DeiT recipe (arXiv 2012.12877)."""

    own_options: ClassVar[type] = ImageRunOptions
    rates: ClassVar[tuple[str, ...]] = (*LionTrainingArguments.rates, "lr", "min_lr")

    def __post_init__(self):
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: its name here is smoothing"
            )
        if self.warmup_epochs is not None:
            if not 0 <= self.warmup_epochs < self.num_train_epochs:
                raise ValueError(
                    f"warmup_epochs={self.warmup_epochs}: expected less than the"
                    f" {self.num_train_epochs} epochs"
                )
            self.warmup_steps = self.warmup_epochs / self.num_train_epochs
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr": self.min_lr}
        self._check_patches_per_batch()
        super().__post_init__()
        if self.patches_per_batch is None:
            self._scale_learning_rate()

    def set_batch_size(self, images: float) -> None:
        """Sets the images of a batch, which with `patches_per_batch` the data decide.

        Args:
            images: the mean over the batches of a process.
        """
        self.per_device_train_batch_size = max(1, round(images))
        self._scale_learning_rate()

    def _scale_learning_rate(self) -> None:
        if not self.learning_rate:
            batch = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
            self.learning_rate = self.lr * batch / 512

    def _check_patches_per_batch(self) -> None:
        if self.patches_per_batch is None:
            return
        if self.patches_per_batch < 1:
            raise ValueError(
                f"patches_per_batch={self.patches_per_batch}: expected an integer of at least 1"
            )
        if self.total_batch_size is not None:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} with patches_per_batch: expected one of"
                " them, because the number of images in a batch varies"
            )
