"""Tables and curves of the runs of benchmarks/learning.py."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learning_arms import arms_of
from learning_tasks import TASKS, Task

TUNING_SEED = 0
# 97.5 % quantiles by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
OURS = (
    *("modern LION-S", "modern LION-D", "modern LION-lit"),
    *("LION-S, normalized silu", "LION-S, convolved projections"),
)
PEERS = ("ModernBERT", "softmax twin", "softmax twin, convolved projections", "BERT", "ViT")
# How much worse "at least as good" may be: 0.3 points of accuracy, 0.01 nats.
TOLERANCE = {"accuracy": 0.003, "loss": 0.01}

Run = dict[str, Any]


def report(runs: Sequence[Run], times: Sequence[Run], output: Path) -> None:
    """Writes `learning.md` and a picture for each task that was run.

    Args:
        runs: the lines of the log.
        times: the steps' times, if they were measured.
        output: folder.
    """
    runs = [timed(run, times) for run in runs]
    command = " ".join(["benchmarks/learning.py", *sys.argv[1:]])
    parts = [
        "# What an equal budget teaches\n\n"
        f"Made by `python {command}` from `learning.jsonl`. The learning rate of every model is the"
        " best of those that were tried on one seed; the figures are those of other seeds, on which"
        " all models see the same data in the same order. ± is half of the 95 % interval of a mean"
        " (Student's t). Seconds are CPU seconds of the training steps, of all threads together: of"
        " steps that all models took in turns (`learning.py time`), else of each model's fastest"
        " run."
    ]
    for name, task in TASKS.items():
        mine = [run for run in runs if run["task"] == name]
        if found := by_arm(task, mine):
            parts += [_table(name, found), *_differences(task, found)]
            _plot(name, found, output / f"learning-{name}.png")
    (output / "learning.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def by_arm(task: Task, runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each arm; longer ones than the task's usual ones are an entry of their own."""
    found: dict[str, list[Run]] = {}
    usual = min((run["steps"] for run in runs), default=0)
    for arm in arms_of(task):
        for run in sorted((x for x in runs if x["arm"] == arm), key=lambda run: run["steps"]):
            steps = run["steps"]
            found.setdefault(arm if steps == usual else f"{arm}, {steps:,} steps", []).append(run)
    return found


def timed(run: Run, times: Sequence[Run]) -> Run:
    """The run as if each of its steps had taken the time that was measured, if one was.

    Runs are made on different days, beside other jobs. Their own times do not compare models.
    """
    steps = [t["step_seconds"] for t in times if (t["task"], t["arm"]) == (run["task"], run["arm"])]
    if not steps:
        return run
    curve = [(step, step * steps[-1], found) for step, _, found in run["curve"]]
    return {**run, "curve": curve, "cpu_seconds": curve[-1][1]}


def _table(name: str, found: dict[str, list[Run]]) -> str:
    task = TASKS[name]
    lines = [
        f"## {name}\n\n{_steps(found)} steps of {task.batch} x {task.length} tokens."
        f" Held-out {task.measure}.\n",
        f"| model | parameters | rates tried: {task.measure} | seeds: {task.measure} | seconds |",
        "|---|---:|---|---|---:|",
    ]
    for arm, runs in found.items():
        tried = ", ".join(
            f"{run['rate']:g}: {_shown(task, run[task.measure])}"
            for run in sorted(runs, key=lambda run: run["rate"])
            if run["seed"] == TUNING_SEED
        )
        values = [run[task.measure] for run in paired(runs).values()]
        reached = f"{_mean(task, values)} ({len(values)})" if values else "not run"
        tried = tried or "that of the shorter runs"
        seconds = min(run["cpu_seconds"] for run in runs)  # others shared the machine
        lines.append(
            f"| {arm} | {runs[0]['parameters']:,} | {tried} | {reached} | {seconds:,.0f} |"
        )
    return "\n".join(lines)


def _steps(found: dict[str, list[Run]]) -> str:
    return " or ".join(
        f"{n:,}" for n in sorted({run["steps"] for runs in found.values() for run in runs})
    )


def paired(runs: Sequence[Run]) -> dict[int, Run]:
    """The runs that are compared, by seed: all but those of the tuning seed."""
    return {run["seed"]: run for run in runs if run["seed"] != TUNING_SEED}


def _differences(task: Task, found: dict[str, list[Run]]) -> list[str]:
    """The table of LION's arms against their peers, at equal tokens and at equal time."""
    lines = []
    for ours in [arm for arm in found if found[arm][0]["arm"] in OURS]:
        for peer in [arm for arm in PEERS if arm in found]:
            pairs = _pairs(found[ours], found[peer])
            if len(pairs) < 2:
                continue
            tokens = [
                _gain(task, a[task.measure], b[task.measure])
                for a, b in pairs
                if a["steps"] == b["steps"]
            ]
            times = [
                _gain(task, *(at_seconds(run, task.measure, _shorter(a, b)) for run in (a, b)))
                for a, b in pairs
            ]
            lines.append(
                f"| {ours} | {peer} |"
                + (f" {_mean(task, tokens)} | {verdict(task, tokens)} |" if tokens else " | |")
                + f" {_mean(task, times)} | {verdict(task, times)} |"
            )
    if not lines:
        return []
    head = (
        f"How much better than its peer, in {'points' if task.measure == 'accuracy' else 'nats'},"
        " over paired seeds. At equal time both are read off their curves at the end of the shorter"
        " run, where the longer one has not yet lowered its learning rate to zero.\n\n"
        "| model | peer | at equal tokens | | at equal time | |\n|---|---|---:|---|---:|---|\n"
    )
    return [head + "\n".join(lines)]


def _pairs(ours: Sequence[Run], peers: Sequence[Run]) -> list[tuple[Run, Run]]:
    first, second = paired(ours), paired(peers)
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def _gain(task: Task, ours: float, peer: float) -> float:
    return ours - peer if task.measure == "accuracy" else peer - ours


def _shorter(a: Run, b: Run) -> float:
    return min(run["curve"][-1][1] for run in (a, b))


def at_seconds(run: Run, measure: str, seconds: float) -> float:
    """What a run had reached after so many CPU seconds, between two points of its curve."""
    points = [(point[1], point[2][measure]) for point in run["curve"]]
    for (start, before), (end, after) in zip(points, points[1:]):
        if start <= seconds <= end:
            return before + (after - before) * (seconds - start) / (end - start)
    return points[-1][1] if seconds > points[-1][0] else points[0][1]


def verdict(task: Task, gains: Sequence[float]) -> str:
    """What the interval of the paired gains allows to say."""
    mean, half = statistics.mean(gains), half_interval(gains)
    if mean - half > 0:
        return "better"
    if mean - half > -TOLERANCE[task.measure]:
        return "at least as good"
    return "worse" if mean + half < 0 else "open"


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean, by Student's t."""
    return STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5


def _shown(task: Task, value: float) -> str:
    return f"{100 * value:.1f} %" if task.measure == "accuracy" else f"{value:.3f}"


def _mean(task: Task, values: Sequence[float]) -> str:
    scale, digits = (100, 1) if task.measure == "accuracy" else (1, 3)
    shown = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) - 1 in STUDENT:
        shown += f" ± {scale * half_interval(values):.{digits}f}"
    return shown


def _plot(name: str, found: dict[str, list[Run]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    measure = TASKS[name].measure
    for arm, runs in found.items():
        best = min(runs, key=lambda run: run["loss"])
        for axis, place in zip(axes, (0, 1)):
            axis.plot(
                [point[place] for point in best["curve"]],
                [point[2][measure] for point in best["curve"]],
                marker=".",
                label=arm,
            )
    axes[0].set_xlabel("steps")
    axes[1].set_xlabel("CPU seconds")
    axes[0].set_ylabel(f"held-out {measure}")
    axes[0].legend(fontsize=8)
    figure.suptitle(name)
    figure.savefig(file, dpi=130)
