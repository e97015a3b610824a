"""Arguments of a run: those of transformers, with defaults for long runs."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import TrainingArguments

from ..folders import existing_part, may_be_written_to
from .options import RunOptions
from .processes import use_cpu_without_accelerator

COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)


@dataclass
class LionTrainingArguments(RunOptions, TrainingArguments):
    """`transformers.TrainingArguments` with defaults for long runs, and ways to continue one.

    Args:
        output_dir: the run's folder; required.
        resume: "auto" continues from the newest whole checkpoint in `output_dir` if there is one,
            "never" starts anew, a checkpoint's folder continues from it.
        do_train: whether to train; without it `run` only evaluates or predicts.
        do_eval: whether to evaluate without training.
        do_predict: whether to write predictions.
        total_batch_size: samples per step over all processes; sets `gradient_accumulation_steps`.
        peak_tflops: the device's peak in TFLOP/s, for model FLOPs utilisation; None to measure its
            rate of matrix products.
    """

    own_options: ClassVar[type] = RunOptions  # what `--help` shows
    rates: ClassVar[tuple[str, ...]] = ("learning_rate", "weight_decay")  # at least 0, finite

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not used: a loss that is not finite stops the run."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop columns that the model's forward does not take."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Whether batches are made in pinned memory."},
    )

    def __post_init__(self):
        self._check_output_dir()
        self._check_numbers()
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops={self.peak_tflops}: expected None or a positive number")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(
                f"save_total_limit={self.save_total_limit}: expected None or an integer of at"
                " least 1"
            )
        if self.report_to in ("no", ["no"]):
            self.report_to = "none"
        use_cpu_without_accelerator()
        asked = self.do_eval  # transformers sets it wherever there is an eval_strategy
        super().__post_init__()
        self.do_eval = asked
        if self.should_save:
            self._check_permission()
        if self.total_batch_size is not None:
            self._divide_batch()

    def _check_numbers(self) -> None:
        """Raises ValueError for numbers with which nothing or only nonsense would be learnt."""
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 1")
        for name in self.rates:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number of at least 0")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs}: expected a positive number, or"
                " max_steps"
            )

    def _check_output_dir(self) -> None:
        """Raises ValueError if the folder cannot be made because a file is in its place."""
        there = existing_part(Path(self.output_dir))
        if there.exists() and not there.is_dir():
            raise ValueError(
                f"output_dir={self.output_dir!r}: {there} is a file; expected a folder, or a new"
                " name"
            )

    def _check_permission(self) -> None:
        """Raises ValueError if nothing may be written to the folder."""
        there = existing_part(Path(self.output_dir))
        if not may_be_written_to(there):
            raise ValueError(
                f"output_dir={self.output_dir!r}: {there} may not be written to; choose another"
                " folder"
            )

    @property
    def samples_at_once(self) -> int:
        """Samples of a forward pass, over all processes."""
        return self.train_batch_size * self.world_size

    def _divide_batch(self) -> None:
        """Sets the accumulated batches of a step; several GPUs in a process share a batch."""
        if self.auto_find_batch_size:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} with auto_find_batch_size=True: expected"
                " one of them, because other batches would change the samples per step"
            )
        at_once, total = self.samples_at_once, self.total_batch_size
        assert total is not None  # asked by __post_init__
        if total < 1 or total % at_once:
            raise ValueError(
                f"total_batch_size={self.total_batch_size}: expected a multiple of the {at_once}"
                " samples at a time"
                f" (per_device_train_batch_size={self.per_device_train_batch_size} on each device)"
            )
        self.gradient_accumulation_steps = total // at_once
