"""GLUE's tasks, each with its metrics and the settings that it is fine-tuned with.

The metrics are `evaluate.Metric`s that need no network, and give the numbers of scikit-learn and
scipy:

    >>> from lion_hf.tasks.glue_tasks import TASKS
    >>> from lion_hf.tasks.metrics import F1
    >>> F1().compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'f1': 0.6666666666666666}
    >>> TASKS["mrpc"].compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}
"""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..data.labelled_text import TextColumns
from ..training.settings import load_yaml
from .glue_settings import SEEDS
from .metrics import METRICS

# What `read_recipes` may change.
RECIPE = {
    "epochs": float,
    "batch_size": int,
    "learning_rate": float,
    "weight_decay": float,
    "seeds": int,
}


@dataclass(frozen=True)
class Task(TextColumns):
    """A task of sentence or sentence-pair classification or regression, and how it is fine-tuned.

    Args:
        sentences: names of the one or two columns of text.
        classes: names of the classes in the order of their numbers; empty for a real-valued target.
        metrics: keys of `METRICS`.
        epochs: passes over the training set.
        batch_size: rows per step, over all processes.
        weight_decay: of AdamW.
        seeds: number of runs.
        submission: names of the files that GLUE's server takes, one per split.
        integers: whether those hold the classes' numbers; else their names.
        from_mnli: whether it may start from the model fine-tuned on MNLI.
        splits: validation splits, each with the prefix of its metrics; test splits are named alike.
        learning_rate: its peak.
        label: name of the column of labels.
        own: whether the data is a user's, as in `TextColumns`.
    """

    metrics: tuple[str, ...]
    epochs: float
    batch_size: int
    weight_decay: float
    seeds: int
    submission: tuple[str, ...] = ("predictions.tsv",)
    integers: bool = False
    from_mnli: bool = False
    splits: tuple[tuple[str, str], ...] = (("validation", ""),)
    learning_rate: float = 1e-5

    @property
    def test_splits(self) -> tuple[str, ...]:
        """The names of the unlabelled splits."""
        return tuple(name.replace("validation", "test") for name, _ in self.splits)

    def compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """All the task's metrics of predicted and true classes or targets (N,)."""
        results = (
            METRICS[key]().compute(predictions=predictions, references=references)
            for key in self.metrics
        )
        return {key: value for result in results for key, value in result.items()}

    def predictions(self, logits: np.ndarray | tuple) -> np.ndarray:
        """Classes or targets (N,) from a model's logits.

        Args:
            logits: (N, classes or 1), or outputs of which they are the first.

        Raises:
            ValueError: if a logit is not finite, which no metric would show.
        """
        logits = logits[0] if isinstance(logits, tuple) else logits
        bad = (~np.isfinite(logits)).any(axis=-1).sum()
        if bad:
            raise ValueError(
                f"the model's logits are not finite for {bad} of {len(logits)} rows: its weights "
                "are broken"
            )
        return (
            logits.argmax(axis=-1)
            if self.classes
            else logits.astype(np.float64).reshape(len(logits))
        )

    def measure(self, logits: np.ndarray | tuple, references: np.ndarray) -> dict[str, float]:
        """The metrics of a model's logits, and the loss over exactly these rows, `exact_loss`."""
        scores = torch.tensor(logits[0] if isinstance(logits, tuple) else logits).float()
        labels = torch.tensor(references)
        loss = (
            F.cross_entropy(scores, labels)
            if self.classes
            else F.mse_loss(scores.flatten(), labels.float())
        )
        return {"exact_loss": loss.item(), **self.compute(self.predictions(logits), references)}


ONE, PAIR, QUESTIONS = ("sentence",), ("sentence1", "sentence2"), ("question1", "question2")
ACCURACY, ACCURACY_F1 = ("accuracy",), ("accuracy", "f1")
MNLI_SPLITS = (("validation_matched", "matched_"), ("validation_mismatched", "mismatched_"))
NLI = ("entailment", "neutral", "contradiction")
CORRELATIONS = ("pearson", "spearmanr")

# fmt: off
# text, classes (in GLUE's own numbering), metrics, epochs, batch size, weight decay, seeds, files
# for GLUE's server
TASKS = {
    "cola": Task(ONE, ("unacceptable", "acceptable"), ("matthews_correlation",),
                 10, 32, 1e-6, 4, ("CoLA.tsv",), True),
    "sst2": Task(ONE, ("negative", "positive"), ACCURACY, 3, 16, 3e-6, 3, ("SST-2.tsv",), True),
    "mrpc": Task(PAIR, ("not_equivalent", "equivalent"), ACCURACY_F1,
                 10, 32, 8e-6, 5, ("MRPC.tsv",), True, from_mnli=True),
    "qqp": Task(QUESTIONS, ("not_duplicate", "duplicate"), ACCURACY_F1,
                5, 16, 3e-6, 1, ("QQP.tsv",), True),
    "stsb": Task(PAIR, (), CORRELATIONS, 8, 32, 3e-6, 5, ("STS-B.tsv",), from_mnli=True),
    "mnli": Task(("premise", "hypothesis"), NLI, ACCURACY,
                 3, 48, 5e-6, 1, ("MNLI-m.tsv", "MNLI-mm.tsv"), splits=MNLI_SPLITS),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment"), ACCURACY,
                 10, 16, 1e-6, 1, ("QNLI.tsv",)),
    "rte": Task(PAIR, ("entailment", "not_entailment"), ACCURACY,
                2, 16, 1e-6, 5, ("RTE.tsv",), from_mnli=True),
    "wnli": Task(PAIR, ("not_entailment", "entailment"), ACCURACY,
                 2, 16, 1e-6, 5, ("WNLI.tsv",), True),
}
# fmt: on
# WNLI is left out, as in the paper and by BERT's authors.
ALL = tuple(name for name in TASKS if name != "wnli")


def task_names(text: str) -> list[str]:
    """The tasks that a comma-separated list or "all" names.

    MNLI comes first, because others may start from its model.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    names = (
        list(ALL)
        if text.strip().lower() == "all"
        else [name.strip().lower() for name in text.split(",")]
    )
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"task={name!r}: {hint}expected names among {tuple(TASKS)}, or 'all' for {ALL}"
            )
    return sorted(dict.fromkeys(names), key=lambda name: name != "mnli")


def read_recipes(path: str | Path) -> dict[str, Task]:
    """`TASKS` with the changes of a YAML file, such as `rte: {epochs: 5, learning_rate: 3e-5}`.

    Raises:
        ValueError: if the file cannot be read, or holds a name that is no task or no setting, or a
            value that is not a number above 0.
    """
    try:
        changes = load_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError) as error:
        raise ValueError(f"recipes={str(path)!r} cannot be read: {error}") from error
    if not isinstance(changes, dict) or not all(
        isinstance(change, dict) for change in changes.values()
    ):
        raise ValueError(f"recipes={str(path)!r}: expected lines such as `rte: {{epochs: 5}}`")
    tasks = dict(TASKS)
    for task, change in changes.items():
        task_names(str(task))
        for name, value in change.items():
            if name not in RECIPE:
                raise ValueError(
                    f"recipes={str(path)!r}: {name!r} of {task}: expected among {tuple(RECIPE)}"
                )
            number = _number(RECIPE[name], value)
            if name == "seeds" and number > len(SEEDS):
                raise ValueError(
                    f"recipes={str(path)!r}: seeds={value!r} of {task}: expected at most "
                    f"{len(SEEDS)}"
                )
            if not 0 < number < float("inf") and not (name == "weight_decay" and value == 0):
                raise ValueError(
                    f"recipes={str(path)!r}: {name}={value!r} of {task}: expected "
                    f"{RECIPE[name].__name__} > 0"
                )
            field: dict[str, Any] = {name: number}
            tasks[task] = replace(tasks[task], **field)
    return tasks


def _number(kind: type, value: Any) -> float:
    """A setting's value as int or float; 0 for what is no such number, such as true or 2.5."""
    try:
        number = kind(value)
        return 0 if isinstance(value, bool) or number != float(value) else number
    except (TypeError, ValueError, OverflowError):
        return 0
