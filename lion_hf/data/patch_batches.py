"""Batches of pictures of different sizes: as many as fit into a number of patches."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat

import numpy as np
from torch.utils.data import Sampler

from .images import Images, count_patches
from .samples import SkippedSample


def patches_of_all(images: Images, native: tuple[int, int | None], budget: int) -> np.ndarray:
    """The patches of every picture, from their headers.

    One that cannot be read counts as the largest, because another will be in its place.

    Args:
        images: the pictures.
        native: the patch's size and the most patches of a picture, as in `open_image`.
        budget: patches of a batch.

    Raises:
        ValueError: if a picture has more patches than a batch.
    """
    counts = np.zeros(len(images), dtype=np.int64)
    for place, source in enumerate(images.images):
        with contextlib.suppress(SkippedSample):
            counts[place] = count_patches(source, native)
        if counts[place] > budget:
            raise ValueError(
                f"patches_per_batch={budget}: {images.where(place)} has {counts[place]} patches;"
                " expected as many at least, or a max_patches"
            )
    return np.where(counts == 0, max(counts.max(), 1), counts)


def full_batches(order: Iterable[int], counts: np.ndarray, budget: int) -> Iterator[list[int]]:
    """Yields samples in an order, as many at a time as fit.

    Args:
        order: numbers of samples.
        counts: patches of the pictures, sample n being picture n % len(counts).
        budget: patches of a batch; no picture has more.
    """
    batch: list[int] = []
    room = budget
    for sample in order:
        patches = int(counts[sample % len(counts)])
        if patches > room:
            yield batch
            batch, room = [], budget
        batch.append(sample)
        room -= patches
    if batch:
        yield batch


class PatchBatches(Sampler[list[int]]):
    """The batches of one process in training. Every epoch has equally many, all of them full.

    They are as many as the pictures make in the order in which they stand. An epoch whose order
    needs fewer goes on with its first pictures, and one that needs more leaves its last out.

    Args:
        order: the samples of an epoch, in its random order.
        counts: patches of each picture.
        budget: patches of a batch.
        process: number of this process.
        processes: how many there are. Batches are dealt out in turn.
    """

    def __init__(
        self,
        order: Sampler[int] | Sequence[int],
        counts: np.ndarray,
        budget: int,
        process: int = 0,
        processes: int = 1,
    ):
        self.order, self.counts, self.budget = order, counts, budget
        self.process, self.processes = process, processes
        batches = sum(1 for _ in full_batches(range(len(counts)), counts, budget))
        self.rounds = -(-batches // processes)

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[list[int]]:
        endless = (sample for _ in repeat(None) for sample in self.order)
        batches = full_batches(endless, self.counts, self.budget)
        return islice(batches, self.process, self.rounds * self.processes, self.processes)


class PatchBudget:
    """How many patches of pictures that keep their size are in a batch.

    Args:
        native: the patch's size and the most patches of a picture, as in `open_image`.
        budget: patches of a batch.
    """

    def __init__(self, native: tuple[int, int | None], budget: int):
        self.native, self.budget = native, budget
        self._counts: list[tuple[Images, np.ndarray]] = []

    def counts(self, images: Images) -> np.ndarray:
        """The patches of every picture; see `patches_of_all`. They are counted once."""
        for known, counts in self._counts:
            if known is images:
                return counts
        counts = patches_of_all(images, self.native, self.budget)
        self._counts.append((images, counts))
        return counts

    def evaluation(self, images: Images) -> list[list[int]]:
        """The batches of all pictures, in their order."""
        counts = self.counts(images)
        return list(full_batches(range(len(counts)), counts, self.budget))

    def images_per_batch(self, images: Images) -> float:
        """The mean over the batches of all pictures."""
        return len(images) / len(self.evaluation(images))

    def training(
        self, images: Images, order: Sampler[int], process: int, processes: int
    ) -> PatchBatches:
        """The batches of a process; arguments as in `PatchBatches`."""
        return PatchBatches(order, self.counts(images), self.budget, process, processes)
