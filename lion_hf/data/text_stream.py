"""A stream of text that cannot be indexed, read from any place on."""

from collections.abc import Callable, Iterator
from itertools import islice

import datasets
import torch
from datasets.exceptions import DatasetsError
from torch.utils.data import get_worker_info

from .documents import reason
from .rows import is_empty
from .samples import sample_seed, seeded

DOCUMENTS_AT_A_TIME = 1000  # read together


class TextStream(torch.utils.data.IterableDataset):
    """Endless rows for training from a stream of documents, epoch after epoch.

    Shards (files) come in random order, and are divided among all processes' workers. With fewer
    shards than workers several share one, each taking its part of the documents. A buffer of
    documents is made into rows, these are put in random order, and the next buffer follows. So a
    row's place is four numbers, and the stream goes on at any place without the rows before it.

    Args:
        source: streamed documents.
        make_rows: from a list of documents to a list of rows (dicts).
        transform: from a row to a sample, under a random state of its own.
        column: the documents' column.
        buffer_size: documents per buffer.
        seed: the run's seed.

    Raises:
        ValueError: for a buffer size below 1; while it is read, if a shard cannot be read or a
            reader finds no text.
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

    def divide(
        self, process: int, processes: int, workers: int, places: dict | None = None, first: int = 0
    ) -> None:
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
            first = self.process * self.workers + reader
            shares = self._shares(epoch)[first :: self.processes * self.workers]
            empty = True
            for number in range(start, len(shares)):
                for before, rows in self._rows(epoch, shares[number], used):
                    for n in range(done, len(rows)):
                        seed = sample_seed(self.seed, epoch, *shares[number], before, n)
                        sample = self._sample(rows[n], seed)
                        yield {**sample, "place": (reader, epoch, number, before, n + 1)}
                    done, empty = 0, empty and not rows
                used = 0
            if empty and start == 0:
                raise ValueError(
                    f"the stream has no text in column {self.column!r} for reader {reader} of"
                    f" {self.workers}"
                )
            epoch, start = epoch + 1, 0

    def _sample(self, row: dict, seed: int) -> dict:
        with seeded(seed):
            return self.transform(row)

    def _rows(
        self, epoch: int, share: tuple[int, int, int], used: int
    ) -> Iterator[tuple[int, list[dict]]]:
        """Pairs of documents used before, and the next buffer's rows in their order."""
        for before, documents in self._buffers(*share, used):
            rows = self.make_rows(documents)
            seed = sample_seed(self.seed, epoch, *share, before)
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            yield before, [rows[n] for n in order]

    def _shares(self, epoch: int) -> list[tuple[int, int, int]]:
        """All (shard, part, parts) in the epoch's order."""
        shards, readers = self.source.num_shards, self.processes * self.workers
        parts = -(-readers // shards)
        order = torch.randperm(
            shards * parts, generator=torch.Generator().manual_seed(sample_seed(self.seed, epoch))
        )
        return [(n // parts, n % parts, parts) for n in order.tolist()]

    def _buffers(
        self, shard: int, part: int, parts: int, used: int
    ) -> Iterator[tuple[int, list[str]]]:
        """Pairs of documents of the shard used before, and the next documents of its part."""
        documents = islice(self._documents(shard, used), part, None, parts)
        while buffer := list(islice(documents, self.buffer_size)):
            other = next((x for x in buffer if not isinstance(x, str | None)), "")
            if not isinstance(other, str):
                raise ValueError(
                    f"column {self.column!r} holds {type(other).__name__}: expected text"
                )
            yield used, [text for text in buffer if text and not is_empty(text)]
            used += self.buffer_size * parts

    def _documents(self, shard: int, used: int) -> Iterator[str | None]:
        """The documents of a shard but for the first ones, which were used before."""
        source = self.source.shard(self.source.num_shards, shard).skip(used)
        try:
            for batch in source.iter(DOCUMENTS_AT_A_TIME):
                yield from batch[self.column]
        except (DatasetsError, OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"shard {shard} of the stream cannot be read on: {reason(error)}; mend it, and"
                " start the run again, which continues"
            ) from error
