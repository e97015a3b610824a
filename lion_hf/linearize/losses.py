"""How far a copy is from its source: losses of attentions, hidden states and answers.

Legend: B rows, L places of a row, D width of the model, N layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..modeling.modeling_lion import LionPreTrainedModel

# Of a dimension of hidden states: what varies less is no feature, and must not rule the loss.
SMALLEST_VARIANCE = 1e-4


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str, tau: float
) -> torch.Tensor:
    """Loss of a student against its teacher for every sample, (B,).

    Args:
        logits: the student's, (B, C).
        teacher_logits: (B, C).
        kind: "hard" for cross-entropy with the teacher's class, "soft" for tau^2 times the
            Kullback-Leibler divergence of the softened probabilities (arXiv 1503.02531).
        tau: temperature of "soft".
    """
    logits, teacher_logits = logits.float(), teacher_logits.float()
    if kind == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(-1), reduction="none")
    student, teacher = (F.log_softmax(x / tau, dim=-1) for x in (logits, teacher_logits))
    return tau**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def relative_error(
    output: torch.Tensor, target: torch.Tensor, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error over squared target.

    Args:
        output: (B, L, ...).
        target: of the same shape.
        tokens: (B, L), 0 for those that do not count; None if all do.
    """
    error, power = (output.float() - target.float()).square(), target.float().square()
    if tokens is not None:
        real = (tokens != 0)[..., None]
        error, power = error * real, power * real
    return error.sum() / power.sum().clamp(min=1e-12)


def state_scales(states: Sequence[torch.Tensor], tokens: torch.Tensor | None) -> torch.Tensor:
    """How much each dimension of the teacher's hidden states varies from token to token.

    A few dimensions of a pretrained encoder are far larger than the others, and nearly constant.
    A plain squared error would see little else.

    Args:
        states: the teacher's hidden states of some batch, N times (B, L, D).
        tokens: (B, L), 0 for those that do not count; None if all do.

    Returns:
        The variances over all tokens, (N, D).
    """
    real = [x.flatten(0, 1) if tokens is None else x[tokens != 0] for x in states]
    variances = [x.float().var(0, unbiased=False) for x in real]
    return torch.stack(variances).clamp(min=SMALLEST_VARIANCE)


def hidden_state_loss(
    states: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    scales: torch.Tensor,
    tokens: torch.Tensor | None,
) -> torch.Tensor:
    """Squared error of each layer's output in units of the teacher's variance, (N,).

    A layer that gives the teacher's mean over all tokens, whatever the token, has a loss of 1.

    Args:
        states: the student's hidden states, N times (B, L, D).
        targets: the teacher's, alike.
        scales: (N, D), by `state_scales`.
        tokens: (B, L), 0 for those that do not count; None if all do.
    """
    losses = []
    for state, target, scale in zip(states, targets, scales, strict=True):
        error = ((state.float() - target.float()).square() / scale).mean(-1)
        if tokens is None:
            losses.append(error.mean())
        else:
            real = tokens != 0
            losses.append((error * real).sum() / real.sum().clamp(min=1))
    return torch.stack(losses)


def answer_loss(
    student: LionPreTrainedModel,
    outputs: Any,
    answers: Any,
    batch: dict[str, torch.Tensor],
    *,
    tau: float,
) -> torch.Tensor:
    """How far a student's outputs are from its teacher's.

    It is a divergence for classes and a relative error for hidden states.

    Args:
        student: the copy.
        outputs: the student's.
        answers: the teacher's, of the same tokens or patches.
        batch: what both were given; `labels` of masked language models say which tokens count.
        tau: temperature of probabilities.
    """
    head, tokens = type(student).__name__, batch.get("attention_mask")
    if head == "LionModel":
        return relative_error(outputs.last_hidden_state, answers.last_hidden_state, tokens)
    if head == "LionForMaskedImageModeling":
        return relative_error(outputs.reconstruction, answers.reconstruction)
    if head == "LionForQuestionAnswering":
        names = ("start_logits", "end_logits")
        pairs = (_real_positions(outputs[name], answers[name], tokens) for name in names)
        first, last = (distillation_loss(*pair, "soft", tau).mean() for pair in pairs)
        return first + last
    logits, targets = outputs.logits, class_logits(answers)
    assert targets is not None  # the answers of a teacher with a head
    kind = problem_type(student)
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float().sigmoid())
    if kind == "regression":
        return F.mse_loss(logits.float(), targets.float())
    if head == "LionForMaskedLM":
        masked = batch["labels"] != -100
        logits, targets = logits[masked], targets[masked]
    elif head == "LionForTokenClassification" and tokens is not None:
        logits, targets = logits[tokens != 0], targets[tokens != 0]
    losses = distillation_loss(logits.flatten(0, -2), targets.flatten(0, -2), "soft", tau)
    return losses.mean() if losses.numel() else losses.sum()


def _real_positions(
    logits: torch.Tensor, targets: torch.Tensor, tokens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits over positions, (B, L), without those of padding."""
    if tokens is None:
        return logits, targets
    return logits.masked_fill(tokens == 0, -1e4), targets.masked_fill(tokens == 0, -1e4)


def problem_type(student: LionPreTrainedModel) -> str:
    """What a model's logits are for, in the words of `problem_type` in transformers."""
    config = student.config
    if type(student).__name__ not in (
        "LionForSequenceClassification",
        "LionForImageClassification",
    ):
        return "single_label_classification"
    return config.problem_type or (
        "regression" if config.num_labels == 1 else "single_label_classification"
    )


def class_logits(outputs: Any) -> torch.Tensor | None:
    """Logits of classes; `BertForPreTraining` has two kinds."""
    return outputs.get("prediction_logits", outputs.get("logits"))
