"""The loop that teaches a student: phases of a plan, measurements, the best state, checkpoints."""

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from torch import nn
from tqdm import tqdm

from .batches import Batches, Place
from .budget import Clock, Phase, rate_at, words_of
from .distillation import Lesson, Measurement
from .held_out import HeldOut
from .run_folder import RunFolder, State, Weights
from .settings import RATE_OPTIONS

logger = logging.getLogger(__name__)

SAVE_SECONDS = 45.0  # between checkpoints, so that a kill loses less than a minute
MEASURING_SHARE = 0.04  # most of the time that goes into measuring on the way
MEASUREMENTS = 15  # most per phase that goes by the clock
MEASUREMENTS_BY_STEPS = 10
CLEARLY = 0.95  # of the best loss so far: from which on a rate replaces the usual one
MAX_GRADIENT_NORM = 1.0
BETAS = (0.9, 0.98)
SHOWN = ("cosine", "agreement", "layer_error")  # in the progress bar: the first that there is
STAGES = ("layers", "answers", "documents")


class Learner:
    """Takes a lesson through the phases of a plan, from wherever its state is.

    Several processes hold the whole student each, see different batches, and average their
    gradients. The first one's clock decides for all.

    Args:
        lesson: student and teacher, on their device.
        batches: per stage.
        held_out: what is measured on.
        state: how far the run is; it is kept up to date.
        folder: where checkpoints go.
        process: its device, and its place among others.
    """

    def __init__(
        self,
        lesson: Lesson,
        batches: Mapping[str, Batches],
        held_out: HeldOut,
        state: State,
        folder: RunFolder,
        process: PartialState,
    ):
        self.lesson, self.batches, self.held_out = lesson, batches, held_out
        self.state, self.folder, self.process = state, folder, process
        self.place: Place = (0, 0)  # of this process's next batch
        self.clock = Clock(state.clock)
        self.kept: dict[str, Any] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.restored: dict[str, Any] = {}  # the optimizer's state in the checkpoint
        self.saved, self.interrupted = self.clock.elapsed, False
        self.bar: tqdm | None = None

    def restore(self, weights: Weights, optimizer: dict[str, Any], kept: dict[str, Any]) -> None:
        """Takes over what a checkpoint holds beside the state."""
        self.lesson.student.load_state_dict(weights)
        self.restored, self.kept = optimizer, kept
        self.place = self._own(self.state.places)

    def run(self) -> None:
        """Goes through all phases that are left.

        Raises:
            KeyboardInterrupt: after SIGINT or SIGTERM; the state is saved then.
            FloatingPointError: if the loss is not finite.
        """
        with self._progress_bar(), self._interruptions():
            while self.state.phase < len(self.state.phases):
                phase = self.state.current()
                self._begin(phase)
                self._learn(phase)
                self._end(phase)

    # A phase

    def _begin(self, phase: Phase) -> None:
        state, student = self.state, self.lesson.student
        self.lesson.begin(phase.stage)
        self.lesson.train()
        if not state.begun:
            state.begun, state.began, state.best = True, self.clock.elapsed, None
            self.place = (0, 0)
            if phase.trial:
                self._keep("start", self.kept.get("start") or weights_of(student))
                student.load_state_dict(self.kept["start"])
            elif phase.rate is None:
                self._take_tried(phase)
        if phase.stage != "layers":
            self.lesson.scale(self.held_out.sample(self.process.device))
        groups = [{"params": x, "factor": factor} for x, factor in self.lesson.groups()]
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True
        )
        if self.restored:
            self.optimizer.load_state_dict(self.restored)
        self.restored = {}

    def _take_tried(self, phase: Phase) -> None:
        """Goes on from the best trial of the stage."""
        tried = self.kept.get("tried")
        if tried is None:
            rates = ", ".join(self.state.trials[phase.stage])
            raise FloatingPointError(
                f"the loss became nan or infinite with every learning rate that was tried ({rates})"
                f" in the stage {phase.stage!r}: give a lower one with {option_of(phase.stage)}"
            )
        self.lesson.student.load_state_dict(tried["weights"])
        self.restored = tried["optimizer"]
        self.state.rates[phase.stage] = tried["rate"]
        self.state.steps[phase.stage] = tried["steps"]
        self.place = self._own(tried["places"])
        self.kept = {}
        logger.info("learning rate of the stage %r: %.2g", phase.stage, tried["rate"])

    def _learn(self, phase: Phase) -> None:
        """Steps until the phase is over, with measurements and checkpoints between them."""
        state = self.state
        rate = phase.rate or state.rates[phase.stage]
        if not phase.trial:
            state.rates[phase.stage] = rate
        if not phase.trial and state.step == 0:
            self._measure(phase)
        while True:
            progress, over, measure, save = self._decide(phase)
            if measure and not phase.trial:
                self._measure(phase)
            if save:
                self._save()
            if self.interrupted:
                raise KeyboardInterrupt
            if over:
                return
            loss = self._step(phase, rate * rate_at(progress))
            state.step += 1
            if not math.isfinite(loss):
                if phase.trial:
                    return
                raise FloatingPointError(
                    f"the loss became nan or infinite in step {state.step} of the stage"
                    f" {phase.stage!r} with learning rate {rate:.2g}: give a lower one with"
                    f" {option_of(phase.stage)}"
                )
            self._show(phase)

    def _end(self, phase: Phase) -> None:
        state, student = self.state, self.lesson.student
        if phase.trial:
            self._note_trial(phase)
        else:
            self._measure(phase)
            student.load_state_dict(self.kept.pop("best"))
            state.steps[phase.stage] = state.steps.get(phase.stage, 0) + state.step
            last = state.phase + 1 == len(state.phases)
            self.measure_all("" if last else phase.stage)
        state.phase, state.step, state.begun = state.phase + 1, 0, False
        self.optimizer = None
        self._save()

    def _note_trial(self, phase: Phase) -> None:
        """Keeps the trial's weights if it is the best of its stage so far."""
        with self.autocast():
            score = self.held_out.examine(self.lesson, quick=True).figures["loss"]
        score = self._shared([score])[0]
        score = score if math.isfinite(score) else math.inf
        scores = self.state.trials.setdefault(phase.stage, {})
        best = min(scores.values(), default=math.inf)
        if score < (CLEARLY * best if scores else best):
            assert self.optimizer is not None and phase.rate is not None
            tried = {
                "weights": weights_of(self.lesson.student),
                "optimizer": self.optimizer.state_dict(),
                "rate": phase.rate,
                "steps": self.state.step,
                "places": self._places(),
            }
            self._keep("tried", tried)
        scores[f"{phase.rate:.2g}"] = score

    # A step

    def _step(self, phase: Phase, rate: float) -> float:
        """One step of the optimizer; returns the loss."""
        assert self.optimizer is not None
        batch, self.place = self.batches[phase.stage].take(self.place)
        loss = self.backward(batch)
        parameters = [x for group in self.optimizer.param_groups for x in group["params"]]
        loss = self._average(loss, parameters)
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def backward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch, after its gradients have been added."""
        batch = {name: x.to(self.process.device) for name, x in batch.items()}
        with self.autocast():
            loss = self.lesson(**batch)["loss"]
        loss.backward()
        return loss.detach()

    def autocast(self) -> torch.autocast:
        """Where a run computes in bfloat16; weights and losses stay in float32."""
        return torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.state.bf16)

    def _average(self, loss: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
        """The mean loss of all processes, after the gradients have become their means."""
        if self.process.num_processes == 1:
            return loss
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]
        flat = torch.cat([loss.float().view(1), *(x.reshape(-1) for x in gradients)])
        torch.distributed.all_reduce(flat)
        flat /= self.process.num_processes
        pieces = flat[1:].split([x.numel() for x in parameters])
        for parameter, piece in zip(parameters, pieces):
            parameter.grad = piece.view_as(parameter)
        return flat[0]

    # Between steps

    def _decide(self, phase: Phase) -> tuple[float, bool, bool, bool]:
        """Progress, and whether to end, to measure and to save, by the first process's clock."""
        state, now = self.state, self.clock.elapsed
        words = (
            phase.progress(state.step, state.began, now),
            float(phase.is_over(state.step, state.began, now)),
            float(self._is_due(phase, now)),
            float(self.interrupted or now - self.saved > SAVE_SECONDS),
            float(self.interrupted),
        )
        progress, *rest = self._shared(words)
        over, measure, save, self.interrupted = map(bool, rest)
        return progress, over, measure, save

    def _is_due(self, phase: Phase, now: float) -> bool:
        """Whether to measure before the next step."""
        if phase.steps is not None:
            every = -(-phase.steps // MEASUREMENTS_BY_STEPS)
            return 0 < self.state.step < phase.steps and self.state.step % every == 0
        pause = max(
            self.held_out.quick_seconds / MEASURING_SHARE,
            (phase.end - self.state.began) / MEASUREMENTS,
        )
        return now - self.state.measured > pause

    def _measure(self, phase: Phase) -> None:
        """Measures on a part of the held-out data, and keeps the weights if they are the best."""
        state = self.state
        last = state.history[-1] if state.history else {}
        if (last.get("phase"), last.get("step")) == (state.phase, state.step):
            return
        began = time.monotonic()
        with self.autocast():
            figures = self.held_out.examine(self.lesson, quick=True).figures
        loss = self._shared([figures["loss"]])[0]
        self.held_out.quick_seconds = time.monotonic() - began
        if math.isfinite(loss) and (state.best is None or loss <= state.best):
            state.best = loss
            self._keep("best", weights_of(self.lesson.student))
        if "best" not in self.kept:
            raise FloatingPointError(
                f"the held-out loss of the stage {phase.stage!r} is {loss}: the source or the data"
                " hold values that are not finite"
            )
        state.measured = self.clock.elapsed
        entry = {"phase": state.phase, "stage": phase.stage, "step": state.step}
        state.history.append(entry | {"seconds": round(state.measured, 1), **figures})
        if self.bar is not None and self.bar.disable:  # no terminal, so a line now and then
            logger.info("%s, step %d: %s", phase.stage, state.step, self._words())

    def measure_all(self, name: str) -> Measurement:
        """Measures on all held-out data, and notes the figures with the name before them."""
        found = self.held_out.examine(self.lesson)
        prefix = f"{name}_" if name else ""
        figures = {f"{prefix}{x}": y for x, y in found.figures.items() if x != "loss"}
        self.state.metrics |= {x: round(y, 4) for x, y in figures.items()}
        self.state.layer_errors[name or "end"] = found.layer_errors
        return found

    def _keep(self, name: str, value: Any) -> None:
        self.kept[name] = value
        self.folder.changed.add(name)

    def _save(self) -> None:
        optimizer = {} if self.optimizer is None else self.optimizer.state_dict()
        self.state.clock, self.state.places = self.clock.elapsed, self._places()
        self.folder.save(self.state, self.lesson.student.state_dict(), optimizer, self.kept)
        self.saved = self.clock.elapsed

    def _places(self) -> list[Place]:
        """The places of all processes."""
        return gather_object([self.place]) if self.process.num_processes > 1 else [self.place]

    def _own(self, places: list[Place]) -> Place:
        """This process's place among those of all."""
        pool, number = places[self.process.process_index]
        return pool, number

    def _shared(self, numbers: Any) -> list[float]:
        """The first process's numbers, in all processes."""
        if self.process.num_processes == 1:
            return list(numbers)
        tensor = torch.tensor(list(numbers), dtype=torch.float64, device=self.process.device)
        return broadcast(tensor).tolist()

    # What the user sees and does

    @contextlib.contextmanager
    def _progress_bar(self) -> Iterator[None]:
        steps = [phase["steps"] for phase in self.state.phases]
        by_steps = self._by_steps
        total = sum(steps) if by_steps else self.state.phases[-1]["end"]
        done = "{n_fmt}/{total_fmt} steps, {remaining} left" if by_steps else "{percentage:3.0f}%"
        with tqdm(
            total=total,
            bar_format=f"{{desc}} |{{bar}}| {done}{{postfix}}",
            mininterval=0.5,
            disable=None if self.process.is_main_process else True,
            dynamic_ncols=True,
        ) as self.bar:
            yield
        self.bar = None

    def _show(self, phase: Phase) -> None:
        """Brings the progress bar up to date."""
        if self.bar is None or self.bar.disable:
            return
        total, done = self.bar.total or 0.0, self.clock.elapsed
        if self._by_steps:
            before = self.state.phases[: self.state.phase]
            done = sum(entry["steps"] for entry in before) + self.state.step
        name = f"{phase.stage}, trying rates" if phase.trial else phase.stage
        self.bar.set_description_str(name, refresh=False)
        self.bar.set_postfix_str(self._words(), refresh=False)
        self.bar.update(min(done, total) - self.bar.n)

    @property
    def _by_steps(self) -> bool:
        """Whether the run has numbers of steps. By the clock, the trials alone have them."""
        return all(phase["steps"] is not None for phase in self.state.phases)

    def _words(self) -> str:
        """The last figure, and the time that is left."""
        last = self.state.history[-1] if self.state.history else {}
        words = [f"{name} {last[name]:.4f}" for name in SHOWN if name in last][:1]
        if not self._by_steps:
            end = self.state.phases[-1]["end"]
            words.append(f"{words_of(max(end - self.clock.elapsed, 0))} left")
        return ", ".join(words)

    @contextlib.contextmanager
    def _interruptions(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step that goes on; the second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            logger.warning("stopping after this step; once more to stop at once")

        for name in before:
            signal.signal(name, stop)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def weights_of(model: nn.Module) -> Weights:
    """A copy of a model's weights, on the CPU."""
    return {name: x.detach().to("cpu", copy=True) for name, x in model.state_dict().items()}


def option_of(stage: str) -> str:
    """The option for a stage's learning rate."""
    return f"--{RATE_OPTIONS[stage]}"
