"""Training on a stream of text that cannot be indexed, continued at the very next row after an interruption."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainerCallback

from .data import sample_seed, seeded
from .trainer import LionTrainer

DOCUMENTS_AT_A_TIME = 1000  # read together


class TextStream(torch.utils.data.IterableDataset):
    """Rows for training from a stream of documents, without end: epoch after epoch, shards in random order, rows in buffers.

    Shards (files) are divided among all processes' workers; with fewer shards than workers several share one, each taking its
    part of the documents. A buffer of documents is made into rows, these are put in random order, and the next buffer follows.
    So a row's place is four numbers, and the stream goes on at any place without the rows before it.

    Args:
        source: streamed documents.
        make_rows: from a list of documents to a list of rows (dicts).
        transform: from a row to a sample, under a random state of its own.
        column: the documents' column.
        buffer_size: documents a buffer.
        seed: the run's seed.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        make_rows: Callable[[list[str]], list[dict]],
        transform: Callable[[dict], dict],
        *,
        column: str = "text",
        buffer_size: int = 10_000,
        seed: int = 0,
    ):
        if buffer_size < 1:
            raise ValueError(f"buffer_size={buffer_size}: expected an integer of at least 1")
        self.source, self.make_rows, self.transform = source, make_rows, transform
        self.column, self.buffer_size, self.seed = column, buffer_size, seed
        self.divide(process=0, processes=1, workers=1)

    def divide(self, process: int, processes: int, workers: int, places: dict | None = None, first: int = 0) -> None:
        """Sets this process's share.

        Args:
            process: its number.
            processes: how many there are.
            workers: readers of each process.
            places: where each reader goes on, reader -> (epoch, shard, documents, rows).
            first: the reader whose turn is next.
        """
        self.process, self.processes, self.workers, self.first = process, processes, workers, first
        self.places = places or {}

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        reader = ((0 if worker is None else worker.id) + self.first) % self.workers
        epoch, start, used, done = self.places.get(reader, (0, 0, 0, 0))
        while True:
            shares = self._shares(epoch)[self.process * self.workers + reader :: self.processes * self.workers]
            empty = True
            for number in range(start, len(shares)):
                for before, documents in self._buffers(*shares[number], used):
                    rows, key = self.make_rows(documents), (self.seed, epoch, *shares[number], before)
                    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(sample_seed(*key)))
                    for n in range(done, len(rows)):
                        with seeded(sample_seed(*key, n)):
                            sample = self.transform(rows[order[n]])
                        yield {**sample, "place": (reader, epoch, number, before, n + 1)}
                    done, empty = 0, empty and not rows
                used = 0
            if empty and start == 0:
                raise ValueError(f"the stream has no text in column {self.column!r} for reader {reader} of {self.workers}")
            epoch, start = epoch + 1, 0

    def _shares(self, epoch: int) -> list[tuple[int, int, int]]:
        """All (shard, part, parts) in the epoch's order."""
        shards, readers = self.source.num_shards, self.processes * self.workers
        parts = -(-readers // shards)
        order = torch.randperm(shards * parts, generator=torch.Generator().manual_seed(sample_seed(self.seed, epoch)))
        return [(n // parts, n % parts, parts) for n in order.tolist()]

    def _buffers(self, shard: int, part: int, parts: int, used: int) -> Iterator[tuple[int, list[str]]]:
        """Pairs of documents of the shard used before, and the next documents of its part."""
        source = self.source.shard(self.source.num_shards, shard).skip(used)
        documents = (text for batch in source.iter(DOCUMENTS_AT_A_TIME) for text in batch[self.column])
        documents = islice(documents, part, None, parts)
        while buffer := list(islice(documents, self.buffer_size)):
            yield used, [text for text in buffer if text and not text.isspace()]
            used += self.buffer_size * parts


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
                raise ValueError(f"{name}='epoch': a stream has no end, so expected 'steps' or 'no'")
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
            args.process_index, args.world_size, workers, dict(self.places), first=(self.last_reader + 1) % workers
        )
        return DataLoader(
            self.train_dataset,
            batch_size=args.train_batch_size,
            collate_fn=_WithPlace(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        self.last_reader, *place = inputs.pop("place")
        self.places[self.last_reader] = tuple(place)
        return super().training_step(model, inputs, num_items_in_batch)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        workers = max(self.args.dataloader_num_workers, 1)
        state = {"processes": self.args.world_size, "workers": workers, "last_reader": self.last_reader, "places": self.places}
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
