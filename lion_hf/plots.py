"""Pictures of a training run and of what LION's heads do.

They need matplotlib, which the models do not: `pip install matplotlib`. Each function writes one
file and leaves matplotlib's global state alone, so it works without a display and inside other
programs.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The range of half-lives in pictures, in tokens. A gate of 1 has no half-life.
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 0.25, 1024.0


def half_lives(log_decay: torch.Tensor) -> torch.Tensor:
    """Tokens after which a gate has halved a token's weight: log 0.5 / log a.

    A gate of 1 has an infinite half-life.

    Args:
        log_decay: logarithms of gates, any shape, as `LionAttention.log_decay` returns them.
    """
    return np.log(0.5) / log_decay.detach().float()


def save_history(log_history: list[dict[str, float]], path: str | Path) -> None:
    """Writes `trainer.state.log_history` as a CSV table: a row per step, a column per quantity."""
    rows: dict[float, dict[str, float]] = {}
    for entry in log_history:
        rows.setdefault(entry["step"], {}).update(entry)
    columns = ["step", *sorted({name for row in rows.values() for name in row} - {"step"})]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))


def plot_curves(
    log_history: list[dict[str, float]],
    path: str | Path,
    title: str,
    metric: str | None = None,
    loss_levels: dict[str, float] | None = None,
    metric_levels: dict[str, float] | None = None,
) -> None:
    """Draws the losses of training and evaluation over the steps, and a metric beside them.

    Args:
        log_history: `trainer.state.log_history`.
        path: file to write; its suffix is the format.
        title: above the picture.
        metric: name of the metric in the log without "eval_"; None for the loss alone.
        loss_levels: dashed horizontal lines in the loss, label to height.
        metric_levels: the same for the metric.
    """
    figure = _figure(10 if metric else 5.5, 3.8)
    axes = figure.subplots(1, 2 if metric else 1, squeeze=False)[0]
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        steps, values = _series(log_history, key)
        axes[0].plot(steps, values, style, label=label, markersize=4, linewidth=1.5)
    axes[0].set_ylabel("cross-entropy (nats)")
    _levels(axes[0], loss_levels)
    if metric:
        steps, values = _series(log_history, f"eval_{metric}")
        axes[1].plot(
            steps, values, "o-", color="tab:green", label="evaluation", markersize=4, linewidth=1.5
        )
        axes[1].set_ylabel(metric.replace("_", " "))
        axes[1].yaxis.set_major_formatter("{x:.0%}")
        _levels(axes[1], metric_levels)
    for axis in axes:
        axis.set_xlabel("optimiser steps")
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path, title)


def plot_layer_errors(errors: Mapping[str, Sequence[float]], path: str | Path, title: str) -> None:
    """Draws an error per layer, on a logarithmic scale: a line per state of a model.

    Args:
        errors: name of the state -> errors of its layers, from the first one.
        path: file to write; its suffix is the format.
        title: above the picture.
    """
    figure = _figure(7, 3.8)
    axis = figure.subplots()
    for name, values in errors.items():
        layers = range(1, len(values) + 1)
        axis.plot(layers, np.maximum(values, 1e-12), "o-", label=name, markersize=4, linewidth=1.5)
    axis.set_yscale("log")
    axis.set_xticks(range(1, 1 + max(map(len, errors.values()))))
    axis.set_xlabel("layer")
    axis.set_ylabel("squared error / squared output")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path, title)


def plot_quality(
    history: Sequence[Mapping[str, Any]], figure_name: str, path: str | Path, title: str
) -> None:
    """Draws a figure over the time of learning, with a line per stage.

    Args:
        history: entries with "stage", "seconds" and the figure.
        figure_name: the figure's key.
        path: file to write; its suffix is the format.
        title: above the picture.
    """
    figure = _figure(7, 3.8)
    axis = figure.subplots()
    for stage in dict.fromkeys(entry["stage"] for entry in history):
        entries = [entry for entry in history if entry["stage"] == stage and figure_name in entry]
        minutes = [entry["seconds"] / 60 for entry in entries]
        values = [entry[figure_name] for entry in entries]
        axis.plot(minutes, values, "o-", label=stage, markersize=4, linewidth=1.5)
    axis.set_xlabel("minutes of learning")
    axis.set_ylabel(figure_name.replace("_", " "))
    axis.grid(alpha=0.3)
    axis.legend(title="stage")
    _save(figure, path, title)


def plot_scores(summary: Mapping[str, Any], path: str | Path, title: str) -> None:
    """Draws scores of tasks as bars with their deviation over seeds.

    Each seed is a dot, and the overall score is a line.

    Args:
        summary: what `lion_hf.tasks.report.summarize` returns.
        path: file to write; its suffix is the format.
        title: above the picture.
    """
    tasks = summary["tasks"]
    means = [100 * task["score"]["mean"] for task in tasks.values()]
    deviations = [100 * (task["score"]["deviation"] or np.nan) for task in tasks.values()]
    figure = _figure(2.5 + 0.9 * len(tasks), 4.2)
    axis = figure.subplots()
    bars = axis.bar(
        list(tasks), means, yerr=deviations, width=0.6, color="tab:blue", alpha=0.75, capsize=4
    )
    axis.bar_label(bars, [f"{mean:.1f}" for mean in means], label_type="center", color="white")
    for place, task in enumerate(tasks.values()):
        scores = [100 * np.mean(list(metrics.values())) for metrics in task["seeds"].values()]
        axis.plot([place] * len(scores), scores, "k.", markersize=5, alpha=0.6)
    if len(tasks) > 1:
        overall = 100 * summary["overall"]
        axis.axhline(
            overall, linestyle="--", linewidth=1.2, color="tab:red", label=f"overall {overall:.1f}"
        )
        axis.legend()
    axis.set_ylabel("score (%)")
    axis.set_ylim(min(0, *means), 100)
    axis.grid(axis="y", alpha=0.3)
    _save(figure, path, title)


def plot_predictions(
    images: Sequence[Any],
    predictions: Sequence[str],
    scores: Sequence[float],
    labels: Sequence[str],
    path: str | Path,
    title: str,
    columns: int = 8,
) -> None:
    """Draws a grid of images under their predicted labels.

    Right labels are green. Wrong ones are red, with the true label below.

    Args:
        images: what `imshow` takes: arrays (height, width[, 3]) or PIL images.
        predictions: predicted labels.
        scores: the probabilities of the predictions.
        labels: true labels.
        path: file to write; its suffix is the format.
        title: above the picture.
        columns: images per row.
    """
    rows = -(-len(images) // columns)
    figure = _figure(1.25 * columns, 1.5 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, prediction, score, label in zip(axes, images, predictions, scores, labels):
        axis.imshow(image, cmap="gray_r")
        right = prediction == label
        verdict = (
            f"{prediction}  {score:.0%}" if right else f"{prediction}  {score:.0%}\ntrue: {label}"
        )
        axis.set_title(verdict, fontsize=10, color="tab:green" if right else "tab:red")
    _save(figure, path, title)


def plot_mixing_matrix(
    weights: torch.Tensor,
    path: str | Path,
    title: str,
    head_names: Sequence[str],
    tokens: Sequence[str] | None = None,
    token_name: str = "token",
) -> None:
    """Draws the matrices with which heads mix tokens: a panel per head, two panels per row.

    Each panel has its own range, up to the 99th percentile of the absolute weights, so that a few
    large entries do not hide the rest. Where weights are negative, they are blue.

    Args:
        weights: (heads, L, L), from `output_attentions=True`. Row i holds what token i takes from
            every token j.
        path: file to write; its suffix is the format.
        title: above the picture.
        head_names: above the panels.
        tokens: words at the axes; None for numbers.
        token_name: what a row stands for, in the axes' labels.
    """
    weights = weights.detach().float().cpu()
    columns = min(len(weights), 2)
    rows = -(-len(weights) // columns)
    figure = _figure(5.2 * columns, 4.6 * rows + 0.3)
    for axis, matrix, name in zip(
        figure.subplots(rows, columns, squeeze=False).ravel(), weights, head_names
    ):
        limit = max(matrix.abs().quantile(0.99).item(), 1e-12)
        signed = bool((matrix < 0).any())
        colours = {"cmap": "RdBu_r", "vmin": -limit} if signed else {"cmap": "magma_r", "vmin": 0}
        image = axis.imshow(matrix, vmax=limit, interpolation="nearest", **colours)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"source {token_name} j")
        axis.set_ylabel(f"target {token_name} i")
        if tokens is not None:
            axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
            axis.set_yticks(range(len(tokens)), tokens, fontsize=8)
        figure.colorbar(
            image, ax=axis, shrink=0.8, label="weight", extend="both" if signed else "max"
        )
    _save(figure, path, title)


def plot_half_lives(
    values: torch.Tensor,
    path: str | Path,
    title: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
    column_label: str,
) -> None:
    """Draws a table of half-lives, coloured on a logarithmic scale.

    Args:
        values: (rows, columns), in tokens, as `half_lives` returns them.
        path: file to write; its suffix is the format.
        title: above the picture.
        row_names: at the rows, for example layers and heads.
        column_names: at the columns, for example heads, or the tokens of a sentence.
        column_label: what the columns are.
    """
    values = values.detach().float().cpu()
    rows, columns = values.shape
    figure = _figure(2.6 + 0.62 * columns, 1.9 + 0.36 * rows)
    axis = figure.subplots()
    shown = values.clamp(SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE)
    image = axis.imshow(shown, cmap="viridis", norm="log", aspect="auto", interpolation="nearest")
    least, most = shown.log().aminmax()
    middle = ((least + most) / 2).exp().item()
    for row in range(rows):
        for column in range(columns):
            colour = "white" if shown[row, column] < middle else "black"
            axis.text(
                column,
                row,
                _short(values[row, column].item()),
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
            )
    axis.set_xticks(
        range(columns),
        column_names,
        rotation=45 if max(map(len, column_names)) > 4 else 0,
        fontsize=9,
    )
    axis.set_yticks(range(rows), row_names, fontsize=9)
    axis.set_xlabel(column_label)
    figure.colorbar(image, ax=axis, label="half-life (tokens)")
    _save(figure, path, title)


def _short(half_life: float) -> str:
    """A half-life in at most four characters."""
    if half_life > LONGEST_HALF_LIFE:
        return "∞"
    return f"{half_life:.0f}" if half_life >= 10 else f"{half_life:.1f}"


def _figure(width: float, height: float):
    """An empty figure, in inches, with a layout that avoids overlaps."""
    from matplotlib.figure import Figure  # here, not above: matplotlib is an optional dependency

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: str | Path, title: str) -> None:
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=130)


def _series(log_history: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the entries that have the key."""
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _levels(axis, levels: dict[str, float] | None) -> None:
    for (label, height), colour in zip(
        (levels or {}).items(), ("tab:red", "tab:purple", "tab:gray")
    ):
        axis.axhline(
            height, linestyle="--", linewidth=1.2, color=colour, label=f"{label} ({height:.4g})"
        )
