"""Batches by their numbers: an interrupted run goes on with the batch that it would have had."""

from collections.abc import Callable
from typing import Any

import torch

from ..data.samples import SeededDataset, sample_seed

POOL = 16  # batches whose rows are sorted by length, so that a batch has little padding


class Batches:
    """An endless sequence of shuffled batches, which depends on seed and number alone.

    Texts of similar lengths come together. Every process has rows of its own.

    Args:
        dataset: the rows.
        collate: makes a batch of rows.
        batch_size: rows per batch, at most those of the data.
        seed: of the order.
        process: number of this process.
        processes: how many there are.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        collate: Callable[[list], dict[str, torch.Tensor]],
        batch_size: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ):
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.rows = max(len(dataset) // processes, 1)
        self.batch_size = min(batch_size, self.rows)
        self.process, self.processes = process, processes
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._pool: tuple[int, list[list[dict[str, Any]]]] = (-1, [])

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        pool, place = divmod(number, POOL)
        if self._pool[0] != pool:
            self._pool = (pool, self._make_pool(pool))
        return self.collate(self._pool[1][place])

    def longest(self) -> dict[str, torch.Tensor]:
        """The batch of the first pool that needs the most memory."""
        self[0]
        return self.collate(max(self._pool[1], key=lambda rows: max(map(_length, rows))))

    def _make_pool(self, pool: int) -> list[list[dict[str, Any]]]:
        size = POOL * self.batch_size
        rows = [self._row(place) for place in range(pool * size, (pool + 1) * size)]
        rows.sort(key=_length)
        batches = [rows[n : n + self.batch_size] for n in range(0, size, self.batch_size)]
        generator = torch.Generator().manual_seed(sample_seed(self.seed, 1, pool))
        return [batches[n] for n in torch.randperm(POOL, generator=generator).tolist()]

    def _row(self, place: int) -> dict[str, Any]:
        epoch, index = divmod(place, self.rows)
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, 0, epoch))
            order = torch.randperm(len(self.dataset), generator=generator).tolist()
            self._epoch = (epoch, order[self.process :: self.processes] or order)
        self.dataset.set_epoch(epoch)
        return self.dataset[self._epoch[1][index]]


def _length(row: dict[str, Any]) -> int:
    return len(row["input_ids"]) if "input_ids" in row else 0
