"""GLUE's metrics, which need no network."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


class GlueMetric(evaluate.Metric):
    """A metric of one number, kept in memory.

    `key` is its name in the result, and `dtype` the type of its inputs.
    """

    key: str
    dtype = "int64"

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {name: datasets.Value(self.dtype) for name in ("predictions", "references")}
        )
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=features
        )

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError(f"{self.key} of no predictions: expected at least one")
        return {self.key: float(self.value(np.asarray(predictions), np.asarray(references)))}

    def value(self, predictions: np.ndarray, references: np.ndarray) -> float:
        """The metric of two arrays (N,)."""
        raise NotImplementedError


class Accuracy(GlueMetric):
    """Share of predictions that are right."""

    key = "accuracy"

    def value(self, predictions, references):
        return (predictions == references).mean()


class F1(GlueMetric):
    """Harmonic mean of precision and recall of class 1 among two; 0 if class 1 occurs nowhere."""

    key = "f1"

    def value(self, predictions, references):
        found = np.union1d(predictions, references)
        if not np.isin(found, (0, 1)).all():
            raise ValueError(f"f1 of classes {found.tolist()}: expected 0 and 1")
        both = (predictions * references).sum()
        either = predictions.sum() + references.sum()
        return 2 * both / either if either else 0.0


class MatthewsCorrelation(GlueMetric):
    """Correlation of predicted and true classes (Gorodkin 2004); 0 if either is constant."""

    key = "matthews_correlation"

    def value(self, predictions, references):
        classes = np.union1d(predictions, references)[:, None]
        predicted = (classes == predictions).astype(float)
        true = (classes == references).astype(float)
        predicted -= predicted.mean(axis=1, keepdims=True)
        true -= true.mean(axis=1, keepdims=True)
        scale = np.sqrt((predicted**2).sum()) * np.sqrt((true**2).sum())
        return (predicted * true).sum() / scale if scale else 0.0


class Pearson(GlueMetric):
    """Linear correlation; 0 if either side is constant, where scipy's is not a number."""

    key = "pearson"
    dtype = "float64"

    def value(self, predictions, references):
        sides = []
        for name, x in (("predictions", predictions), ("references", references)):
            if not np.isfinite(x).all():
                raise ValueError(
                    f"{self.key}: {(~np.isfinite(x)).sum()} of {len(x)} {name} are not finite"
                )
            if np.ptp(x) == 0:
                return 0.0
            x = x / np.abs(x).max()  # against under- and overflow of the squares
            x = x - x.mean()
            sides.append(x / np.linalg.norm(x))
        return np.clip(sides[0] @ sides[1], -1, 1)


class Spearman(Pearson):
    """Linear correlation of the ranks; 0 if either side is constant."""

    key = "spearmanr"

    def value(self, predictions, references):
        return super().value(
            *(ranks(x) if np.isfinite(x).all() else x for x in (predictions, references))
        )


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks (N,) of values (N,) from 1 on, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


METRICS = {metric.key: metric for metric in (Accuracy, F1, MatthewsCorrelation, Pearson, Spearman)}
