"""Results over tasks and seeds: summary, table, files to submit."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..folders import whole_file, write_json, write_text
from .glue_tasks import Task


def statistics(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and sample deviation, None for a single value."""
    values = np.array(list(values), dtype=np.float64)
    return {
        "mean": float(values.mean()),
        "deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
    }


def summarize(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict:
    """Mean and deviation over seeds, and the overall score.

    The score of one run is the mean of its metrics (accuracy and F1, Pearson and Spearman, or MNLI
    matched and mismatched, as GLUE takes them), that of a task the mean over its seeds, and the
    overall score the mean over tasks.

    Args:
        results: task -> seed -> metric -> value between -1 and 1.

    Returns:
        `{"overall": ..., "tasks": {task: {"score": {"mean", "deviation"}, "metrics": {...},
        "seeds": {seed: metrics}}}}`
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task, seeds in results.items():
        runs = list(seeds.values())
        tasks[task] = {
            "score": statistics(float(np.mean(list(run.values()))) for run in runs),
            "metrics": {metric: statistics(run[metric] for run in runs) for metric in runs[0]},
            "seeds": {str(seed): dict(run) for seed, run in seeds.items()},
        }
    overall = float(np.mean([task["score"]["mean"] for task in tasks.values()])) if tasks else None
    return {"overall": overall, "tasks": tasks}


def table(summary: Mapping, markdown: bool = False) -> str:
    """What `summarize` returns as text, in percent: tasks, and the overall score of several."""
    rows = [("task", "seeds", "score", "±", "metrics")]
    for name, task in summary["tasks"].items():
        metrics = ", ".join(
            f"{metric} {_percent(value)}" for metric, value in task["metrics"].items()
        )
        deviation = task["score"]["deviation"]
        shown = "-" if deviation is None else f"{100 * deviation:.2f}"
        rows.append(
            (name, str(len(task["seeds"])), f"{100 * task['score']['mean']:.2f}", shown, metrics)
        )
    if len(summary["tasks"]) > 1:
        rows.append(
            (
                "overall",
                "",
                f"{100 * summary['overall']:.2f}",
                "",
                f"mean of {len(summary['tasks'])} tasks",
            )
        )
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---|---:|---:|---:|---|", *lines[1:]])
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:4], widths[1:]), row[4]])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _percent(value: Mapping[str, float | None]) -> str:
    mean, deviation = value["mean"], value["deviation"]
    assert mean is not None  # only the deviation of a single run is None
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def write_predictions(path: str | Path, predictions: Iterable, task: Task) -> None:
    """Writes predictions of a test set as GLUE's server takes them.

    The file is TSV with a row's index and its class or target.

    Args:
        path: file to write.
        predictions: classes or targets (N,).
        task: STS-B's targets are cut to its range, 0 to 5, and rounded.
    """
    with whole_file(Path(path)) as file:
        lines = csv.writer(file, delimiter="\t", lineterminator="\n")  # quotes names with tabs
        lines.writerow(("index", "prediction"))
        for index, value in enumerate(predictions):
            if not task.classes and "STS-B.tsv" in task.submission:
                shown = f"{np.clip(value, 0, 5):.3f}"
            elif not task.classes:
                shown = f"{value:.9g}"  # all that float32 holds, whatever the targets' size
            else:
                shown = str(int(value)) if task.integers else task.classes[int(value)]
            lines.writerow((index, shown))


def save_summary(summary: Mapping, folder: str | Path, title: str, stem: str = "results") -> None:
    """Writes a summary as JSON, as a table and, if matplotlib is installed, as a picture.

    Args:
        summary: from `summarize`.
        folder: the folder of the files `results.json`, `results.md` and `results.png`.
        title: above table and picture.
        stem: the files' name without suffix.
    """
    folder = Path(folder)
    write_json(folder / f"{stem}.json", summary)
    text = f"# {title}\n\n{table(summary, markdown=True)}\n"
    write_text(folder / f"{stem}.md", text)
    try:
        from ..plots import plot_scores

        plot_scores(summary, folder / f"{stem}.png", title)
    except ImportError:  # a picture less, and all numbers are there
        pass
