"""The data that a run measures on: how many samples it can afford, and how it measures."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset, Subset

from ..data.samples import spread_evenly
from .distillation import Lesson, Measurement, examine, examine_documents, retrieval

QUICK_SAMPLES = 256  # of a measurement on the way
SCALE_SAMPLES = 32  # from which the scales of hidden states are taken
FULL_SHARE = 0.015  # of a budget, for one measurement of all samples
QUICK_SHARE = 0.003
FEWEST_SAMPLES = 32  # fewer say too little
TIMED_SAMPLES = 4  # with which the time of a measurement is estimated first
FEWEST_DOCUMENTS = 2  # of a thousand tokens or more


@dataclass
class HeldOut:
    """Samples to measure on.

    Args:
        data: the samples.
        collate: makes a batch of them.
        batch_size: samples per batch.
        full: samples of a full measurement, spread evenly.
        quick: samples of a measurement on the way.
        documents: long documents, in batches of one; none for models that do not learn from them.
        quick_seconds: what the last quick measurement took.
    """

    data: Dataset
    collate: Callable
    batch_size: int
    full: int
    quick: int
    documents: list[dict[str, torch.Tensor]] = field(default_factory=list)
    quick_seconds: float = 0.0

    @classmethod
    def of(cls, data: Dataset, collate: Callable, batch_size: int) -> "HeldOut":
        """All samples, of which some are for measurements on the way."""
        count = len(data)  # type: ignore[arg-type]
        return cls(data, collate, batch_size, count, min(count, QUICK_SAMPLES))

    def examine(self, lesson: Lesson, quick: bool = False) -> Measurement:
        """Measures; a full measurement also compares the distances between embeddings.

        In the stage of long documents, the loss is that of texts and that of documents.
        """
        count = self.quick if quick else self.full
        found = examine(lesson, self._spread(count), self.collate, self.batch_size)
        if not quick:
            found.figures.update(retrieval(found.embeddings))
        if self.documents and (lesson.stage == "documents" or not quick):
            figures = examine_documents(lesson, self.documents)
            figures["loss"] = found.figures["loss"] + figures.get("loss", 0.0)
            found.figures.update(figures)
        return found

    def sample(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Some samples, whatever the batch size, on a device."""
        data = self._spread(min(SCALE_SAMPLES, self.quick))
        batch = self.collate([data[n] for n in range(len(data))])
        return {name: x.to(device) for name, x in batch.items()}

    def limit(self, lesson: Lesson, budget: float) -> float:
        """Takes as many samples as a budget, in seconds, has time for.

        Returns:
            About how many seconds a full measurement takes.
        """
        size = min(self.batch_size, self.full, TIMED_SAMPLES)
        each = min(self._seconds(lesson, size) for _ in range(2)) / size  # the first warms up
        whole = min(self.batch_size, self.full)
        if each * whole < FULL_SHARE * budget:  # larger batches take less time for each sample
            each = self._seconds(lesson, whole) / whole
        for name, share in (("full", FULL_SHARE), ("quick", QUICK_SHARE)):
            affordable = max(int(share * budget / each), FEWEST_SAMPLES)
            setattr(self, name, min(getattr(self, name), affordable))
        seconds = self.full * each
        if self.documents:
            began = time.monotonic()
            examine_documents(lesson, self.documents[:1])
            took = time.monotonic() - began
            affordable = int(QUICK_SHARE * budget / took)
            self.documents = self.documents[: max(affordable, FEWEST_DOCUMENTS)]
            seconds += len(self.documents) * took
        return seconds

    def _seconds(self, lesson: Lesson, size: int) -> float:
        """What a measurement of some samples in one batch takes."""
        began = time.monotonic()
        examine(lesson, self._spread(size), self.collate, size)
        return time.monotonic() - began

    @property
    def sizes(self) -> list[int]:
        """How much is measured: samples of a full and of a quick measurement, documents."""
        return [self.full, self.quick, len(self.documents)]

    @sizes.setter
    def sizes(self, sizes: Sequence[int]) -> None:
        self.full, self.quick, documents = sizes
        self.documents = self.documents[:documents]

    def _spread(self, count: int) -> Subset:
        return Subset(self.data, spread_evenly(len(self.data), count))  # type: ignore[arg-type]
