"""Training on a stream of text, which continues at the next row after an interruption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from .sequence_trainer import SequenceTrainer


class StreamingTrainer(SequenceTrainer):
    """`SequenceTrainer` for a `TextStream`. Every checkpoint holds the place of each reader.

    A run continues with the number of processes and workers that it began with, of which as many
    share a row.

    Raises:
        ValueError: without `max_steps`; to evaluate, save or log by epochs, which never end; with
            `auto_find_batch_size`; or if training continues with other processes or workers.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self.args, name) == "epoch":
                raise ValueError(
                    f"{name}='epoch': a stream has no end, so expected 'steps' or 'no'"
                )
        if self.args.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True with a stream: expected False, because the rows of the"
                " tries that fail would be lost"
            )
        self.args.ignore_data_skip = True  # the stream itself goes to its place
        self.add_callback(_Continue(self))
        self.places, self.last_reader, self.checkpoint = {}, -1, None

    def _checkpoint_of(self, resume: str | bool | None, saves: bool) -> str | None:
        self.checkpoint = super()._checkpoint_of(resume, saves)
        return self.checkpoint

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process's share of the stream, each with the place of its last row."""
        args = self.args
        workers = max(args.dataloader_num_workers, 1)
        if self.checkpoint is not None:
            self.places, self.last_reader = self._saved_places(self.checkpoint, workers)
        self.train_dataset.divide(
            *self._row_reader,
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

    def _saved_places(self, checkpoint: str, workers: int) -> tuple[dict[int, tuple], int]:
        """The readers' places in a checkpoint, and the number of the last reader."""
        file, now = self._file(checkpoint), (self.args.world_size, workers, self._row_reader[1])
        if not file.is_file():  # a process that the run did not have
            file = Path(checkpoint, "stream-0.json")
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            before = saved["processes"], saved["workers"], saved.get("readers", now[2])
            places = {int(reader): tuple(place) for reader, place in saved["places"].items()}
            last = int(saved["last_reader"])
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"{file} cannot be read ({type(error).__name__}: {error}): remove"
                f" {Path(checkpoint).name}, and the run continues from the checkpoint before"
            ) from error
        if before != now:
            raise ValueError(
                f"{now[0]} processes with"
                f" dataloader_num_workers={self.args.dataloader_num_workers}, {now[0] // now[2]} to"
                f" a row: a stream continues as it began, with {before[0]} of {before[1]},"
                f" {before[0] // before[2]} to a row"
            )
        return places, last

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
            "readers": self._row_reader[1],
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
    """Does what Trainer does for data that it can skip.

    It restores the random state, and counts epochs from the beginning of the run.
    """

    def __init__(self, trainer: StreamingTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.checkpoint is not None:
            self.trainer._load_rng_state(self.trainer.checkpoint)
            self.trainer.checkpoint = None

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps
