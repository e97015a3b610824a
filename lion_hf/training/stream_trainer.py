"""Training on a stream of text that cannot be indexed, continued at the very next row after an interruption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from .trainer import LionTrainer


class StreamingTrainer(LionTrainer):
    """`LionTrainer` for a `TextStream`. Every checkpoint holds the place of each reader.

    A run continues with the number of processes and workers that it began with.

    Raises:
        ValueError: without `max_steps`, to evaluate, save or log by epochs, which never end, or if training continues with
            other processes or workers.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self.args, name) == "epoch":
                raise ValueError(
                    f"{name}='epoch': a stream has no end, so expected 'steps' or 'no'"
                )
        self.args.ignore_data_skip = True  # the stream itself goes to its place
        self.add_callback(_Continue(self))
        self.places, self.last_reader, self.checkpoint = {}, -1, None

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As in Trainer; `resume_from_checkpoint` is None or a folder."""
        self.checkpoint = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process's share of the stream, each with the place of its last row."""
        args = self.args
        workers = max(args.dataloader_num_workers, 1)
        if self.checkpoint is not None:
            saved = json.loads(self._file(self.checkpoint).read_text(encoding="utf-8"))
            if (saved["processes"], saved["workers"]) != (args.world_size, workers):
                raise ValueError(
                    f"{args.world_size} processes with dataloader_num_workers={args.dataloader_num_workers}: a stream continues"
                    f" as it began, with {saved['processes']} of {saved['workers']}"
                )
            self.places = {int(reader): tuple(place) for reader, place in saved["places"].items()}
            self.last_reader = saved["last_reader"]
        self.train_dataset.divide(
            args.process_index,
            args.world_size,
            workers,
            dict(self.places),
            first=(self.last_reader + 1) % workers,
        )
        return DataLoader(
            self.train_dataset,
            batch_size=args.train_batch_size,
            collate_fn=_WithPlace(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch=None
    ) -> torch.Tensor:
        self.last_reader, *place = inputs.pop("place")
        self.places[self.last_reader] = tuple(place)
        return super().training_step(model, inputs, num_items_in_batch)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        workers = max(self.args.dataloader_num_workers, 1)
        state = {
            "processes": self.args.world_size,
            "workers": workers,
            "last_reader": self.last_reader,
            "places": self.places,
        }
        self._file(output_dir).write_text(json.dumps(state), encoding="utf-8")

    def _file(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"stream-{self.args.process_index}.json")


class _WithPlace:
    """A collator that passes on the place of a batch's last row."""

    def __init__(self, collator: Callable[[list[dict]], dict]):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict:
        place = [row.pop("place") for row in rows][-1]
        return {**self.collator(rows), "place": place}


class _Continue(TrainerCallback):
    """What Trainer does for data that it can skip: puts back the random state, and counts epochs from the run's beginning."""

    def __init__(self, trainer: StreamingTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.checkpoint is not None:
            self.trainer._load_rng_state(self.trainer.checkpoint)
            self.trainer.checkpoint = None

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps
