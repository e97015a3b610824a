"""GLUE: its tasks with the settings they are fine-tuned with, its metrics, and the table of results.

The metrics are `evaluate.Metric`s that need no network, and give the numbers of scikit-learn and scipy:

    >>> from lion_hf.glue import TASKS, F1, Pearson
    >>> F1().compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'f1': 0.6666666666666666}
    >>> TASKS["mrpc"].compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
import yaml
from torch.nn import functional as F

# What `read_recipes` may change.
RECIPE = {"epochs": float, "batch_size": int, "learning_rate": float, "weight_decay": float, "seeds": int}
SEEDS = (19, 8364, 717, 10536, 90166)  # a task takes the first ones


class GlueMetric(evaluate.Metric):
    """A metric of one number, kept in memory; `key` is its name in the result and `dtype` that of its inputs."""

    key: str
    dtype = "int64"

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value(self.dtype) for name in ("predictions", "references")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        if len(predictions) == 0:
            raise ValueError(f"{self.key} of no predictions: expected at least one")
        return {self.key: float(self.value(predictions, references))}

    def value(self, predictions: np.ndarray, references: np.ndarray) -> float:
        """The metric of two arrays (N,)."""
        raise NotImplementedError


class Accuracy(GlueMetric):
    """Share of predictions that are right."""

    key = "accuracy"

    def value(self, predictions, references):
        return (predictions == references).mean()


class F1(GlueMetric):
    """Harmonic mean of precision and recall of class 1 among classes 0 and 1; 0 where class 1 occurs nowhere."""

    key = "f1"

    def value(self, predictions, references):
        found = np.union1d(predictions, references)
        if not np.isin(found, (0, 1)).all():
            raise ValueError(f"f1 of classes {found.tolist()}: expected 0 and 1")
        both = (predictions * references).sum()
        either = predictions.sum() + references.sum()
        return 2 * both / either if either else 0.0


class MatthewsCorrelation(GlueMetric):
    """Correlation of predicted and true classes, of any number (Gorodkin 2004); 0 where either is constant."""

    key = "matthews_correlation"

    def value(self, predictions, references):
        classes = np.union1d(predictions, references)[:, None]
        predicted, true = (classes == predictions).astype(float), (classes == references).astype(float)
        predicted -= predicted.mean(axis=1, keepdims=True)
        true -= true.mean(axis=1, keepdims=True)
        scale = np.sqrt((predicted**2).sum()) * np.sqrt((true**2).sum())
        return (predicted * true).sum() / scale if scale else 0.0


class Pearson(GlueMetric):
    """Linear correlation; 0, where scipy's is not a number, if either side is constant: such predictions explain nothing."""

    key = "pearson"
    dtype = "float64"

    def value(self, predictions, references):
        sides = []
        for name, x in (("predictions", predictions), ("references", references)):
            if not np.isfinite(x).all():
                raise ValueError(f"{self.key}: {(~np.isfinite(x)).sum()} of {len(x)} {name} are not finite")
            if np.ptp(x) == 0:
                return 0.0
            x = x / np.abs(x).max()  # against under- and overflow of the squares
            x = x - x.mean()
            sides.append(x / np.linalg.norm(x))
        return np.clip(sides[0] @ sides[1], -1, 1)


class Spearman(Pearson):
    """Linear correlation of the ranks, equal values sharing the mean of theirs; 0 if either side is constant."""

    key = "spearmanr"

    def value(self, predictions, references):
        return super().value(*(ranks(x) if np.isfinite(x).all() else x for x in (predictions, references)))


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks (N,) of values (N,) from 1 on, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


METRICS = {metric.key: metric for metric in (Accuracy, F1, MatthewsCorrelation, Pearson, Spearman)}


@dataclass(frozen=True)
class Task:
    """A task of sentence or sentence-pair classification or regression, and how it is fine-tuned.

    Args:
        sentences: names of the one or two columns of text.
        classes: names of the classes in the order of their numbers; empty for a real-valued target.
        metrics: keys of `METRICS`.
        epochs: passes over the training set.
        batch_size: rows a step, over all processes.
        weight_decay: of AdamW.
        seeds: number of runs.
        splits: validation splits, each with the prefix of its metrics; test splits are named alike.
        submission: names of the files that GLUE's server takes, one a split.
        integers: whether those hold the classes' numbers; else their names.
        from_mnli: whether it may start from the model fine-tuned on MNLI.
        label: name of the column of labels.
        learning_rate: its peak.
        own: whether the data is a user's, whose labels are the classes' names; GLUE's may also be their numbers.
    """

    sentences: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    epochs: float
    batch_size: int
    weight_decay: float
    seeds: int
    submission: tuple[str, ...] = ("predictions.tsv",)
    integers: bool = False
    from_mnli: bool = False
    splits: tuple[tuple[str, str], ...] = (("validation", ""),)
    label: str = "label"
    learning_rate: float = 1e-5
    own: bool = False

    @property
    def test_splits(self) -> tuple[str, ...]:
        """The names of the unlabelled splits."""
        return tuple(name.replace("validation", "test") for name, _ in self.splits)

    def compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        """All the task's metrics of predicted and true classes or targets (N,)."""
        results = (METRICS[key]().compute(predictions=predictions, references=references) for key in self.metrics)
        return {key: value for result in results for key, value in result.items()}

    def predictions(self, logits: np.ndarray | tuple) -> np.ndarray:
        """Classes or targets (N,) from a model's logits (N, classes or 1), or from outputs of which they are the first.

        Raises:
            ValueError: if a logit is not finite, which no metric would show.
        """
        logits = logits[0] if isinstance(logits, tuple) else logits
        bad = (~np.isfinite(logits)).any(axis=-1).sum()
        if bad:
            raise ValueError(f"the model's logits are not finite for {bad} of {len(logits)} rows: its weights are broken")
        return logits.argmax(axis=-1) if self.classes else logits.astype(np.float64).reshape(len(logits))

    def measure(self, logits: np.ndarray | tuple, references: np.ndarray) -> dict[str, float]:
        """The metrics of a model's logits, as in `predictions`, and the loss over exactly these rows, `exact_loss`."""
        scores = torch.tensor(logits[0] if isinstance(logits, tuple) else logits).float()
        labels = torch.tensor(references)
        loss = F.cross_entropy(scores, labels) if self.classes else F.mse_loss(scores.flatten(), labels.float())
        return {"exact_loss": loss.item(), **self.compute(self.predictions(logits), references)}


ONE, PAIR, QUESTIONS = ("sentence",), ("sentence1", "sentence2"), ("question1", "question2")
ACCURACY, ACCURACY_F1 = ("accuracy",), ("accuracy", "f1")
MNLI_SPLITS = (("validation_matched", "matched_"), ("validation_mismatched", "mismatched_"))
NLI = ("entailment", "neutral", "contradiction")
CORRELATIONS = ("pearson", "spearmanr")

# fmt: off
# text, classes, metrics, epochs, batch size, weight decay, seeds, files to submit; in GLUE's own numbering of classes
TASKS = {
    "cola": Task(ONE, ("unacceptable", "acceptable"), ("matthews_correlation",), 10, 32, 1e-6, 4, ("CoLA.tsv",), True),
    "sst2": Task(ONE, ("negative", "positive"), ACCURACY, 3, 16, 3e-6, 3, ("SST-2.tsv",), True),
    "mrpc": Task(PAIR, ("not_equivalent", "equivalent"), ACCURACY_F1, 10, 32, 8e-6, 5, ("MRPC.tsv",), True, from_mnli=True),
    "qqp": Task(QUESTIONS, ("not_duplicate", "duplicate"), ACCURACY_F1, 5, 16, 3e-6, 1, ("QQP.tsv",), True),
    "stsb": Task(PAIR, (), CORRELATIONS, 8, 32, 3e-6, 5, ("STS-B.tsv",), from_mnli=True),
    "mnli": Task(("premise", "hypothesis"), NLI, ACCURACY, 3, 48, 5e-6, 1, ("MNLI-m.tsv", "MNLI-mm.tsv"), splits=MNLI_SPLITS),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment"), ACCURACY, 10, 16, 1e-6, 1, ("QNLI.tsv",)),
    "rte": Task(PAIR, ("entailment", "not_entailment"), ACCURACY, 2, 16, 1e-6, 5, ("RTE.tsv",), from_mnli=True),
    "wnli": Task(PAIR, ("not_entailment", "entailment"), ACCURACY, 2, 16, 1e-6, 5, ("WNLI.tsv",), True),
}
# fmt: on
ALL = tuple(name for name in TASKS if name != "wnli")  # as in the paper, and as BERT's authors did: WNLI is left out


def task_names(text: str) -> list[str]:
    """The tasks that a comma-separated list or "all" names, MNLI first, because others may start from its model.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    names = list(ALL) if text.strip().lower() == "all" else [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"task={name!r}: {hint}expected names among {tuple(TASKS)}, or 'all' for {ALL}")
    return sorted(dict.fromkeys(names), key=lambda name: name != "mnli")


def read_recipes(path: str | Path) -> dict[str, Task]:
    """`TASKS` with the changes of a YAML file, such as `rte: {epochs: 5, learning_rate: 3e-5}`.

    Raises:
        ValueError: if the file cannot be read, or names no task or none of its settings, or a value that is no number above 0.
    """
    try:
        changes = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"recipes={str(path)!r} cannot be read: {error}") from error
    if not isinstance(changes, dict) or not all(isinstance(change, dict) for change in changes.values()):
        raise ValueError(f"recipes={str(path)!r}: expected lines such as `rte: {{epochs: 5}}`")
    tasks = dict(TASKS)
    for task, change in changes.items():
        task_names(str(task))
        for name, value in change.items():
            if name not in RECIPE:
                raise ValueError(f"recipes={str(path)!r}: {name!r} of {task}: expected among {tuple(RECIPE)}")
            try:
                number = RECIPE[name](value)  # YAML takes 3e-5 for a word
            except (TypeError, ValueError):
                number = 0
            if name == "seeds" and number > len(SEEDS):
                raise ValueError(f"recipes={str(path)!r}: seeds={value!r} of {task}: expected at most {len(SEEDS)}")
            if number <= 0 and not (name == "weight_decay" and value == 0):
                raise ValueError(f"recipes={str(path)!r}: {name}={value!r} of {task}: expected {RECIPE[name].__name__} > 0")
            tasks[task] = replace(tasks[task], **{name: number})
    return tasks


def statistics(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and sample deviation, None for a single value."""
    values = np.array(list(values), dtype=np.float64)
    return {"mean": float(values.mean()), "deviation": float(values.std(ddof=1)) if len(values) > 1 else None}


def summarize(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict:
    """Mean and deviation over seeds, and the overall score.

    The score of one run is the mean of its metrics (accuracy and F1, Pearson and Spearman, or MNLI matched and mismatched,
    as GLUE takes them), that of a task the mean over its seeds, and the overall score the mean over tasks.

    Args:
        results: task -> seed -> metric -> value between -1 and 1.

    Returns:
        `{"overall": ..., "tasks": {task: {"score": {"mean", "deviation"}, "metrics": {...}, "seeds": {seed: metrics}}}}`
    """
    tasks = {}
    for task, seeds in results.items():
        runs = list(seeds.values())
        tasks[task] = {
            "score": statistics(np.mean(list(run.values())) for run in runs),
            "metrics": {metric: statistics(run[metric] for run in runs) for metric in runs[0]},
            "seeds": {str(seed): dict(run) for seed, run in seeds.items()},
        }
    overall = float(np.mean([task["score"]["mean"] for task in tasks.values()])) if tasks else None
    return {"overall": overall, "tasks": tasks}


def table(summary: Mapping, markdown: bool = False) -> str:
    """What `summarize` returns as text, in percent: a line a task, and the overall score if there are several."""
    rows = [("task", "seeds", "score", "±", "metrics")]
    for name, task in summary["tasks"].items():
        metrics = ", ".join(f"{metric} {_percent(value)}" for metric, value in task["metrics"].items())
        deviation = task["score"]["deviation"]
        shown = "-" if deviation is None else f"{100 * deviation:.2f}"
        rows.append((name, str(len(task["seeds"])), f"{100 * task['score']['mean']:.2f}", shown, metrics))
    if len(summary["tasks"]) > 1:
        rows.append(("overall", "", f"{100 * summary['overall']:.2f}", "", f"mean of {len(summary['tasks'])} tasks"))
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---|---:|---:|---:|---|", *lines[1:]])
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:4], widths[1:]), row[4]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _percent(value: Mapping[str, float | None]) -> str:
    deviation = "" if value["deviation"] is None else f" ± {100 * value['deviation']:.2f}"
    return f"{100 * value['mean']:.2f}{deviation}"


def write_predictions(path: str | Path, predictions: Iterable, task: Task) -> None:
    """Writes predictions of a test set as GLUE's server takes them: TSV with a row's index and its class or target.

    Args:
        path: file to write.
        predictions: classes or targets (N,).
        task: STS-B's targets are cut to its range, 0 to 5.
    """
    with open(path, "w", encoding="utf-8") as file:
        file.write("index\tprediction\n")
        for index, value in enumerate(predictions):
            if not task.classes:
                shown = f"{np.clip(value, 0, 5) if 'STS-B.tsv' in task.submission else value:.3f}"
            else:
                shown = str(int(value)) if task.integers else task.classes[int(value)]
            file.write(f"{index}\t{shown}\n")


def save_summary(summary: Mapping, folder: str | Path, title: str) -> None:
    """Writes `results.json`, `results.md` and, where matplotlib is installed, `results.png` into the folder."""
    folder = Path(folder)
    (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(f"# {title}\n\n{table(summary, markdown=True)}\n", encoding="utf-8")
    try:
        from .plots import plot_scores

        plot_scores(summary, folder / "results.png", title)
    except ImportError:  # a picture less, and all numbers are there
        pass
