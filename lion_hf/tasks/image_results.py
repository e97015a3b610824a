"""What becomes of an image classifier's logits: figures, and a table of predictions."""

import csv
from pathlib import Path

import numpy as np
import torch
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from ..data.images import UNKNOWN, Images, check_share
from ..folders import whole_file


def answers(
    logits: torch.Tensor | tuple, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is kept of a batch's logits.

    Returns:
        The five best classes, or as many as there are, (B, <= 5), the probability of the best one,
        (B,), and the loss, (B,). For unreadable pictures the probability is NaN and the loss 0.
    """
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    best = logits.topk(min(5, logits.shape[-1])).indices
    return best, logits.softmax(-1).amax(-1), losses


def accuracies(
    prediction: EvalPrediction, num_classes: int, max_unreadable: float = 1.0
) -> dict[str, float]:
    """The figures of the pictures that have a label and could be read.

    Args:
        prediction: of `answers`.
        num_classes: above five, the accuracy of the best five is given too.
        max_unreadable: share of the pictures that may be left out.

    Returns:
        `accuracy`, `accuracy_top5`, `exact_loss` (mean), and `left_out` if pictures were left out.

    Raises:
        ValueError: if more pictures than `max_unreadable` allows could not be read.
    """
    best, probabilities, losses = prediction.predictions
    labels = prediction.label_ids
    counted = labels != UNKNOWN
    unreadable = int((np.isnan(probabilities) & ~counted).sum())
    check_share(["see the warnings before"] * unreadable, len(labels), "evaluated", max_unreadable)
    result: dict[str, float] = {}
    if not counted.all():
        result["left_out"] = int((~counted).sum())
    if not counted.any():
        return result
    right = best[counted] == labels[counted, None]
    result |= {"accuracy": float(right[:, 0].mean()), "exact_loss": float(losses[counted].mean())}
    return result | ({"accuracy_top5": float(right.any(1).mean())} if num_classes > 5 else {})


def write_predictions(output: PredictionOutput, images: Images, file: Path) -> None:
    """Writes a table of the pictures: file, label, predicted class, and its probability.

    The label is empty if it is unknown, the prediction if the picture could not be read.
    """
    best, probabilities, _ = output.predictions
    with whole_file(file) as handle:
        table = csv.writer(handle)
        table.writerow(["file", "label", "predicted", "probability"])
        for row, number in enumerate(images.labels):
            label = "" if number == UNKNOWN else images.names[number]
            read = not np.isnan(probabilities[row])
            predicted = images.names[best[row, 0]] if read else ""
            probability = f"{probabilities[row]:.6f}" if read else ""
            table.writerow([images.where(row), label, predicted, probability])
