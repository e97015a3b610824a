"""How the time for learning is divided: durations in words, a clock that survives interruptions,
and the phases of a run."""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

# the stages
IN_WORDS = {"layers": "on the layers", "answers": "end to end", "documents": "on long documents"}
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
LAYERS_SHARE = 0.3  # of the time for learning; the rest is for the whole network
TRIAL_SHARE = 0.02  # of a stage's time, per learning rate that is tried
TRIAL_FACTORS = (1.0, 1 / 3, 3.0)  # of the usual learning rate, which is tried first
TRIAL_STEPS = 25  # fewer prefer a learning rate that is too low for the whole run
WARM_UP = 0.05  # share of a phase


def seconds_of(text: str) -> float:
    """The seconds that "90s", "30m", "2h", "1h30m" or a plain number of seconds stand for.

    Raises:
        ValueError: for anything else, and for zero.
    """
    text = text.strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    elif parts and "".join(map("".join, parts)) == text:
        seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    else:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"budget={text!r}: expected a time such as 90s, 30m, 2h or 1h30m")
    return seconds


def words_of(seconds: float) -> str:
    """A duration as people write it: "45 s", "12 min", "1 h 30 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return " ".join([f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(minutes or not hours))


class Clock:
    """Seconds of learning, over all parts of an interrupted run.

    Args:
        elapsed: what earlier parts took.
    """

    def __init__(self, elapsed: float = 0.0):
        self.start = time.monotonic() - elapsed

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start


@dataclass
class Phase:
    """Part of a run with one learning rate, which rises and then falls to zero.

    Args:
        stage: "layers", "answers" or "documents".
        rate: the peak learning rate; None for the best one of the stage's trials.
        trial: whether it only tries the rate.
        steps: how long it is, if it is counted in steps.
        end: seconds on the run's clock at which it ends, if it goes by the clock.
    """

    stage: str
    rate: float | None
    trial: bool = False
    steps: int | None = None
    end: float = 0.0

    def progress(self, step: int, began: float, now: float) -> float:
        """How much of the phase is over in the middle of the next step, from 0 to 1.

        Args:
            step: steps done.
            began: seconds on the clock when the phase began.
            now: seconds on the clock.
        """
        if self.steps is not None:
            return min((step + 0.5) / self.steps, 1.0)
        half = (now - began) / step / 2 if step else 0.0
        return min((now + half - began) / max(self.end - began, 1e-9), 1.0)

    def is_over(self, step: int, began: float, now: float) -> bool:
        """Whether no further step fits; by the clock there is at least one."""
        if self.steps is not None:
            return step >= self.steps
        return step > 0 and self.progress(step, began, now) >= 1.0


def rate_at(progress: float) -> float:
    """The factor of the peak learning rate: a linear rise, then a line down to zero."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


@dataclass(frozen=True)
class Speed:
    """What was measured before a run was planned, in seconds.

    Args:
        steps: a step of each stage.
        measurement: one full measurement on held-out data.
    """

    steps: dict[str, float]
    measurement: float


def report_seconds(budget: float) -> float:
    """The part of a budget for the comparison of speeds at the end."""
    return min(max(0.03 * budget, 0.5), 60.0)


@dataclass(frozen=True)
class Wishes:
    """What a plan depends on beside the time.

    Args:
        given: learning rate per stage, None to find it.
        usual: learning rates that suit most models.
        layers: the share of the time that goes to the layers; 0 for no such stage.
        documents: the share of the time that goes to long documents; of the rest, `layers` is a
            share.
    """

    given: dict[str, float | None]
    usual: dict[str, float]
    layers: float = LAYERS_SHARE
    documents: float = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the time of the stages that there are."""
        rest = 1 - self.documents
        shares = {
            "layers": rest * self.layers,
            "answers": rest * (1 - self.layers),
            "documents": self.documents,
        }
        return {stage: share for stage, share in shares.items() if share}


def plan_by_clock(budget: float, now: float, speed: Speed, wishes: Wishes) -> list[Phase]:
    """The phases of a run that ends with its budget.

    A stage without a given learning rate begins with short trials, if there is time for them.

    Args:
        budget: seconds in all.
        now: seconds that are over.
        speed: what was measured.
        wishes: what else is known.

    Raises:
        ValueError: if there is no time for one step of each stage.
    """
    shares = wishes.shares
    fixed = now + len(shares) * speed.measurement + report_seconds(budget)
    learning, needed = budget - fixed, max(speed.steps[x] / shares[x] for x in shares)
    if learning < needed:
        steps = " and ".join(f"{speed.steps[x]:.1f} s {IN_WORDS[x]}" for x in shares)
        raise ValueError(
            f"budget={words_of(budget)} is too short for one step of each stage: here a step takes"
            f" {steps}, and measuring {fixed:.1f} s. Expected at least"
            f" {math.ceil(fixed + needed)}s, or a smaller batch_size"
            + (", or another document_share" if wishes.documents else "")
        )
    phases, begin = list[Phase](), now
    for stage, share in shares.items():
        end = begin + share * learning
        phases += _phases_of(stage, begin, end, speed.steps[stage], wishes)
        begin = end + speed.measurement
    return phases


def _phases_of(
    stage: str, begin: float, end: float, step: float, wishes: Wishes
) -> Iterator[Phase]:
    """The trials of a stage, if there are any, and the rest of it."""
    given, usual, trial = wishes.given[stage], wishes.usual[stage], TRIAL_SHARE * (end - begin)
    if given is not None or trial < TRIAL_STEPS * step:
        yield Phase(stage, given or usual, end=end)
        return
    for factor in TRIAL_FACTORS:  # by steps, so that a busy machine does not favour one
        yield Phase(stage, factor * usual, trial=True, steps=int(trial / step))
    yield Phase(stage, None, end=end)


def plan_by_steps(steps: dict[str, int], wishes: Wishes) -> list[Phase]:
    """The phases of a run with given numbers of steps per stage; stages without steps are left out.

    Nothing is tried: a learning rate that is not given is the usual one.
    """
    return [
        Phase(stage, wishes.given[stage] or wishes.usual[stage], steps=count)
        for stage, count in steps.items()
        if count
    ]
