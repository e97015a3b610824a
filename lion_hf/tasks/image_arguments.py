"""Arguments of a run of `lion-hf images`."""

from dataclasses import dataclass
from typing import ClassVar

from ..training.arguments import LionTrainingArguments
from .image_settings import ImageRunOptions


@dataclass
class ImageTrainingArguments(ImageRunOptions, LionTrainingArguments):
    """`LionTrainingArguments` with the names and defaults of the DeiT recipe (arXiv 2012.12877)."""

    own_options: ClassVar[type] = ImageRunOptions

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
        super().__post_init__()
        if not self.learning_rate:
            batch = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
            self.learning_rate = self.lr * batch / 512
