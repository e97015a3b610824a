"""Samples whose randomness is their own."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)
MOST_SKIPPED = 100  # unusable samples in a row, after which the data set itself must be wrong


def spread_evenly(length: int, count: int) -> list[int]:
    """Places of `count` of so many samples, from the first one on, at equal distances."""
    return [n * length // count for n in range(count)]


def sample_seed(*numbers: int) -> int:
    """One seed below 2^63 from several numbers, such as the run's seed, the epoch and the index."""
    sequence = np.random.SeedSequence([number % 2**32 for number in numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's (CPU) random numbers, and afterwards puts them back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SkippedSample(Exception):
    """Raised by a transform for a sample that cannot be used; its text is the reason."""


class SeededDataset(Dataset):
    """Transformed samples whose random choices depend on seed, epoch and index alone.

    So they are the same for any number of workers and processes, and in a run that was interrupted.
    A sample whose transform raises `SkippedSample` is replaced by the next one. Each is named in a
    warning, and `skipped` counts them over all workers.

    Args:
        dataset: samples by index, with a length.
        transform: from a sample to a dict, under the sample's own random state; None leaves it as
            it is. The dict gets "seed" added.
        seed: the run's seed.
        vary: whether the choices change from epoch to epoch; False for evaluation.
        repeats: how often every sample occurs, each time with choices of its own: index i is sample
            i % len(dataset).

    Raises:
        ValueError: if the data set is empty, or more than 100 samples in a row are unusable.
    """

    def __init__(
        self,
        dataset: Sequence,
        transform: Callable[[Any], dict] | None = None,
        seed: int = 0,
        vary: bool = True,
        repeats: int = 1,
    ):
        if len(dataset) == 0:
            raise ValueError("the data set has no samples: expected at least one")
        self.dataset, self.transform = dataset, transform
        self.seed, self.vary, self.repeats = seed, vary, repeats
        # shared, because workers may outlive an epoch
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._skipped = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset) * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's random numbers; `LionTrainer` calls it."""
        if self.vary:
            self.epoch.fill_(epoch)

    @property
    def skipped(self) -> int:
        """Samples that could not be used so far, in this process and its workers."""
        return self._skipped.item()

    def __getitem__(self, index: int) -> dict:
        for tried in range(MOST_SKIPPED):
            place = (index + tried) % len(self)
            seed = sample_seed(self.seed, self.epoch.item(), place)
            try:
                with seeded(seed):
                    sample = self.dataset[place % len(self.dataset)]
                    sample = sample if self.transform is None else self.transform(sample)
            except SkippedSample as reason:
                self._skipped += 1
                logger.warning("sample %d is skipped: %s", place % len(self.dataset), reason)
            else:
                return {**sample, "seed": seed}
        raise ValueError(
            f"{MOST_SKIPPED} samples in a row, from number {index}, cannot be used; the warnings"
            " before say why"
        )
