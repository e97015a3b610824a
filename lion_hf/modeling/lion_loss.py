"""The loss of the classification heads, and what image classifiers return."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass
class LionImageClassifierOutput(ImageClassifierOutput):
    """`ImageClassifierOutput` with the logits (B, C) of the distillation head, if the model has one."""

    distillation_logits: torch.FloatTensor | None = None


def classification_loss(logits, labels, problem_type: str, num_items_in_batch=None) -> torch.Tensor:
    """Loss of a classifier or regressor, summed and divided by the items of the whole (accumulated) batch.

    Args:
        logits: (B, C).
        labels: class indices (B,), -100 to ignore; class probabilities (B, C); for "multi_label_classification" zeros and
            ones (B, C); for "regression" targets (B,) or (B, C).
        problem_type: as in `PreTrainedConfig`.
        num_items_in_batch: entries of the labels other than -100 in the whole batch, as Trainer counts them; None for the
            mean over this batch.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    per_item = 1
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type={problem_type!r}: expected None or one of {PROBLEM_TYPES}")
    if (problem_type != PROBLEM_TYPES[0] or labels.is_floating_point()) and labels.numel() != logits.numel():
        raise ValueError(
            f"labels {tuple(labels.shape)} for {problem_type}: expected one for each of logits {tuple(logits.shape)}"
        )
    if problem_type == "regression":
        total = F.mse_loss(logits.reshape(labels.shape), labels.float(), reduction="sum")
    elif problem_type == "multi_label_classification":
        total = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
    elif labels.is_floating_point():
        total = F.cross_entropy(logits, labels.float(), reduction="sum")
        per_item = labels.shape[-1]  # Trainer counts every probability as an item
    else:
        total = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total * per_item / (items.to(total.device) if torch.is_tensor(items) else items)
