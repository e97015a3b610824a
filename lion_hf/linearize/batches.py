"""Batches by their places: an interrupted run goes on with the batch that it would have had."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

from ..data.samples import SeededDataset, sample_seed

TOKENS = 1024  # of a batch, if its rows are not counted
FEWER_TOKENS = 256  # where there is time for few steps
POOL_ROWS = 2048  # that are sorted by length together
POOL_BATCHES = 16  # in a pool, if rows are counted
FULL_ENOUGH = 0.6  # share of a batch's tokens from which it ends with its length
Batch = dict[str, torch.Tensor]
Place = tuple[int, int]  # number of a pool, and of a batch in it


class Batches:
    """An endless sequence of shuffled batches, which depends on the seed alone.

    Texts of equal length come together, so that there is next to no padding. Every process has
    rows of its own.

    Args:
        dataset: the rows.
        collate: makes a batch of rows.
        batch_size: rows per batch, at most those of the data. None for about `TOKENS` tokens.
        seed: of the order.
        process: number of this process.
        processes: how many there are.
        documents: long documents by any index. Each is a batch; there are as many of them as of
            other batches.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        collate: Callable[[list], Batch],
        batch_size: int | None,
        seed: int,
        process: int = 0,
        processes: int = 1,
        documents: Dataset | None = None,
    ):
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.rows = max(len(dataset) // processes, 1)
        self.batch_size = None if batch_size is None else min(batch_size, self.rows)
        self.process, self.processes, self.documents = process, processes, documents
        self.sorts = "input_ids" in dataset[0]
        self._epoch: tuple[int, list[int]] = (-1, [])
        self.resize(TOKENS)

    def take(self, place: Place) -> tuple[Batch, Place]:
        """The batch at a place, and the place of the next one. The first place is (0, 0)."""
        pool, number = place
        batches = self._batches(pool)
        last = number + 1 == len(batches)
        return self.collate(batches[number]), (pool + 1, 0) if last else (pool, number + 1)

    def resize(self, tokens: int) -> None:
        """Makes batches of about so many tokens from now on, if rows are not counted."""
        self.tokens = tokens
        self._pool: tuple[int, list[list[dict[str, Any]]]] = (-1, [])

    def largest(self) -> Batch:
        """The batch of the first pool with the most tokens, which takes the most time and memory.

        The longest text may be alone in the last batch of a pool, which then takes little time.
        """

        def size(rows: list[dict[str, Any]]) -> tuple[int, int]:
            longest = max(map(_length, rows))
            return len(rows) * longest, longest

        return self.collate(max(self._batches(0), key=size))

    def _batches(self, pool: int) -> list[list[dict[str, Any]]]:
        if self._pool[0] != pool:
            self._pool = (pool, self._make_pool(pool))
        return self._pool[1]

    def _make_pool(self, pool: int) -> list[list[dict[str, Any]]]:
        size = self._pool_rows()
        rows = [self._row(place) for place in range(pool * size, (pool + 1) * size)]
        if not self.sorts:
            return [rows]
        rows.sort(key=_length)
        batches = list(self._cut(rows))
        if self.documents is not None:
            first = pool * size * self.processes + self.process  # rows are at least as many
            places = range(first, first + len(batches) * self.processes, self.processes)
            batches += [[self.documents[place]] for place in places]
        generator = torch.Generator().manual_seed(sample_seed(self.seed, 1, pool))
        return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]

    def _pool_rows(self) -> int:
        if self.batch_size is None:
            return min(POOL_ROWS, self.rows)
        return self.batch_size * (
            min(POOL_BATCHES, self.rows // self.batch_size) if self.sorts else 1
        )

    def _cut(self, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Batches of rows that are sorted by length."""
        if self.batch_size is not None:
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]
            return
        batch: list[dict[str, Any]] = []
        for row in rows:
            length = _length(row)
            longer = batch and length > _length(batch[-1])
            used = sum(map(_length, batch))
            too_many = length * (len(batch) + 1) > self.tokens
            if batch and (too_many or (longer and used >= FULL_ENOUGH * self.tokens)):
                yield batch
                batch = []
            batch.append(row)
        yield batch

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
