"""The folder beside the output in which a run keeps its state, until the output is written."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..folders import cannot_write, write_json
from ..training import checkpoints
from ..training.lock import folder_lock
from ..training.settings import differences
from .batches import TOKENS
from .budget import Phase

RECORD_FILE = "run.json"  # what the run depends on
STATE_FILE = "state.pt"
SUFFIX = ".run"  # after the output's name

Weights = dict[str, torch.Tensor]


@dataclass
class State:
    """How far a run is, as plain values.

    Args:
        bf16: whether the run computes in bfloat16.
        tokens: of a step end to end, about, if its texts are not counted.
        clock: seconds of learning.
        phases: the plan; empty until it is made.
        phase: number of the phase that goes on; as many as there are once all are over.
        begun: whether it has begun, perhaps without a step yet.
        began: seconds on the clock when it began.
        step: steps done in it.
        places: of the next batch of each process: they cut their rows into batches of their own.
        best: the lowest held-out loss in it.
        measured: seconds on the clock after the last measurement.
        samples: held-out samples of a full and of a quick measurement, and long documents.
        trials: per stage, the held-out loss that each tried learning rate led to.
        rates: the learning rate of each stage.
        steps: steps of each stage, without those of trials that were not kept.
        history: one entry per measurement.
        metrics: figures of full measurements.
        layer_errors: error of each layer's attention, per full measurement.
    """

    bf16: bool = False
    tokens: int = TOKENS
    clock: float = 0.0
    phases: list[dict[str, Any]] = field(default_factory=list)
    phase: int = 0
    begun: bool = False
    began: float = 0.0
    step: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)
    best: float | None = None
    measured: float = 0.0
    samples: list[int] = field(default_factory=list)
    trials: dict[str, dict[str, float]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    layer_errors: dict[str, list[float]] = field(default_factory=dict)

    def current(self) -> Phase:
        """The phase that goes on."""
        return Phase(**self.phases[self.phase])


def run_folder_of(output: Path) -> Path:
    """Where the run of an output keeps its state, beside it."""
    return output.with_name(f"{output.name}{SUFFIX}")


class RunFolder:
    """Sealed checkpoints of a run, one whole one at any time.

    Args:
        path: the folder.
        writes: whether this process writes; the others only read.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.changed: set[str] = set()  # kept weights that the last checkpoint does not have
        self.last: Path | None = None

    @contextlib.contextmanager
    def held(self, record: Mapping[str, Any]) -> Iterator[None]:
        """Holds the folder for a run; an error before the first checkpoint leaves nothing behind.

        Args:
            record: what the run depends on, as plain values.

        Raises:
            ValueError: if another run uses the folder, it is not a run's, or the run in it depends
                on other things, which are named.
        """
        if self.path.exists() and not self._is_own():
            raise ValueError(f"{self.path} exists and is not a run's folder: rename or remove it")
        with folder_lock(self.path):
            self._check(record)
            write_json(self.path / RECORD_FILE, dict(record))
            try:
                yield
            except BaseException:
                if checkpoints.find_checkpoint(self.path) is None:
                    self.remove()
                raise

    def remove(self) -> None:
        """Deletes the folder."""
        if self._is_own():
            shutil.rmtree(self.path)

    def _is_own(self) -> bool:
        others = {".run.lock"}
        return self.path.is_dir() and (
            (self.path / RECORD_FILE).is_file()
            or {entry.name for entry in self.path.iterdir()} <= others
        )

    def _check(self, record: Mapping[str, Any]) -> None:
        file = self.path / RECORD_FILE
        if not file.is_file():
            return
        cure = f"remove {self.path} to start anew"
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            changes = differences(before, json.loads(json.dumps(record)))
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} cannot be read ({error}): {cure}") from error
        if changes and checkpoints.find_checkpoint(self.path) is not None:
            raise ValueError(
                f"the interrupted run in {self.path} began with other settings:"
                f" {'; '.join(changes.values())}."
                f" Give the command that it began with, or {cure}"
            )

    def save(
        self, state: State, weights: Weights, optimizer: dict[str, Any], kept: Mapping[str, Any]
    ) -> None:
        """Writes a checkpoint and deletes the one before.

        Args:
            state: the plain values.
            weights: the student's.
            optimizer: the optimizer's state.
            kept: other weights by name. Those that have not changed are linked.

        Raises:
            OSError: if it cannot be written; the one before stays.
        """
        if not self.writes:
            return
        number = 1 + max((_number(x) for x in checkpoints.checkpoints(self.path)), default=0)
        folder = self.path / f"checkpoint-{number}"
        try:
            checkpoints.begin(folder)
            for name, value in kept.items():
                self._keep(folder / f"{name}.pt", value)
            torch.save(
                {"state": asdict(state), "weights": weights, "optimizer": optimizer},
                folder / STATE_FILE,
            )
            checkpoints.seal(folder)
        except Exception as error:
            if checkpoints.is_own(folder):
                checkpoints.remove(folder)
            if not cannot_write(error):
                raise
            raise OSError(
                f"{folder} could not be written and was removed: {error}. Make room and give the"
                " same command again: it goes on from the last whole state"
            ) from error
        checkpoints.rotate(folder, 1)
        self.last, self.changed = folder, set()

    def _keep(self, file: Path, value: Any) -> None:
        before = None if self.last is None else self.last / file.name
        if before is not None and file.stem not in self.changed and before.is_file():
            try:
                os.link(before, file)
            except OSError:  # a filesystem without links
                shutil.copyfile(before, file)
        else:
            torch.save(value, file)

    def load(self) -> tuple[State, Weights, dict[str, Any], dict[str, Any]] | None:
        """What `save` was given the last time; None if there is no whole checkpoint."""
        folder = checkpoints.find_checkpoint(self.path)
        if folder is None:
            return None
        content = {
            file.stem: torch.load(file, map_location="cpu", weights_only=True)
            for file in sorted(folder.glob("*.pt"))
        }
        own = content.pop(Path(STATE_FILE).stem)
        self.last = folder
        return State(**own["state"]), own["weights"], own["optimizer"], content


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
