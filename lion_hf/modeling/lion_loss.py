"""The losses of the heads, and what image classifiers return."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForMaskedLMLoss
from transformers.modeling_outputs import ImageClassifierOutput

from .lion_checks import IGNORED, check_integers, check_labels, check_tensors
from .lion_numerics import gradients_again, plainly_on_cpu

LOGITS_AT_A_TIME = 2**18  # of the loss on a CPU: 1 MiB in float32
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass
class LionImageClassifierOutput(ImageClassifierOutput):
    """`ImageClassifierOutput` with the logits (B, C) of the distillation head, if there is one."""

    distillation_logits: torch.FloatTensor | None = None


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Loss of a classifier or regressor.

    The sum over the batch, divided by the items of the whole (accumulated) batch.

    Args:
        logits: (B, C).
        labels: class indices (B,), -100 to ignore; class probabilities (B, C); for
            "multi_label_classification" zeros and ones (B, C); for "regression" targets (B,) or
            (B, C).
        problem_type: as in `PreTrainedConfig`.
        num_items_in_batch: entries of the labels other than -100 in the whole batch, as Trainer
            counts them; None for the mean over this batch. A batch without any has the loss 0.

    Raises:
        ValueError: for an unknown problem type, or labels of another type or shape, or on the CPU
            out of range.
    """
    check_tensors(labels=labels)
    logits, labels = logits.float(), labels.to(logits.device)
    per_item = 1
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type={problem_type!r}: expected None or one of {PROBLEM_TYPES}")
    real = problem_type != PROBLEM_TYPES[0] or labels.is_floating_point()
    one_each = logits.shape[1] == 1 and labels.shape == logits.shape[:1]
    one_each = one_each and problem_type == "regression"
    if real and labels.shape != logits.shape and not one_each:
        raise ValueError(
            f"labels {tuple(labels.shape)} for {problem_type}: expected one for each of logits"
            f" {tuple(logits.shape)}"
        )
    if problem_type == "regression":
        total = F.mse_loss(logits.reshape(labels.shape), labels.float(), reduction="sum")
    elif problem_type == "multi_label_classification":
        total = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
    elif real:
        total = F.cross_entropy(logits, labels.float(), reduction="sum")
        per_item = labels.shape[-1]  # Trainer counts every probability as an item
    else:
        labels = check_labels(
            "labels",
            labels[:, 0] if labels.shape[1:] == (1,) else labels,
            logits.shape[:1],
            logits.shape[1],
        )
        total = F.cross_entropy(logits, labels, reduction="sum")
    if real and num_items_in_batch is None:
        num_items_in_batch = labels.numel()  # -100 is a number like any other
    items = _items(labels, num_items_in_batch)
    return total * per_item / (items.to(total.device) if torch.is_tensor(items) else items)


def choose_problem_type(
    problem_type: str | None, num_labels: int, labels: torch.Tensor | None = None
) -> str:
    """What kind of classifier a model is.

    Args:
        problem_type: that of the configuration, which decides if it is not None.
        num_labels: one label is a regression.
        labels: the labels, where real ones mean that an item may have several; else None.
    """
    if problem_type is not None:
        return problem_type
    if num_labels == 1:
        return "regression"
    several = torch.is_tensor(labels) and labels.is_floating_point()
    return "multi_label_classification" if several else "single_label_classification"


def check_token_labels(
    labels: torch.Tensor | None, tokens: torch.Tensor, num_labels: int, kwargs: dict
) -> tuple[torch.Tensor | None, dict]:
    """Labels of tokens as int64, and the loss function's arguments with their number.

    So a batch without any label has the loss 0, where the mean over none would be NaN.

    Args:
        labels: (B, L), -100 where there is none, or None.
        tokens: (B, L, any).
        num_labels: number of classes.
        kwargs: arguments of the loss function.

    Raises:
        ValueError: for labels of another type or shape, or on the CPU out of range.
    """
    if labels is None:
        return None, kwargs
    labels = check_labels("labels", labels, tokens.shape[:2], num_labels)
    labels = labels.to(tokens.device)  # the model's parts may be on several devices
    labels = labels.contiguous()  # the losses of transformers take a view of them
    items = _items(labels, kwargs.get("num_items_in_batch"))
    return labels, {**kwargs, "num_items_in_batch": items}


def masked_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    **kwargs,
) -> torch.Tensor:
    """`ForMaskedLMLoss` of transformers, on a CPU with one tensor of the logits' size, not three.

    Args:
        logits: (..., V).
        labels: (...), `ignore_index` where there is none.
        vocab_size: V.
        num_items_in_batch: what the sum of the losses is divided by; None for their number.
        ignore_index: the label of tokens that do not count.
        **kwargs: what else Trainer gives to losses; not read.
    """
    rows, targets = logits.view(-1, vocab_size), labels.view(-1)
    if not plainly_on_cpu(rows, targets) or not rows.numel():
        options = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
        return ForMaskedLMLoss(logits, labels, vocab_size, **options)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    return _CrossEntropy.apply(rows, targets, ignore_index) / num_items_in_batch


class _CrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of rows (N, V), some rows at a time.

    Only the gradient is as large as the logits, which are kept as they are.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignored = ignored
        losses = [
            F.cross_entropy(x.float(), y, ignore_index=ignored, reduction="sum")
            for x, y in _pieces(logits, labels)
        ]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled() or not plainly_on_cpu(grad):  # differentiated again, or batched

            def function(x: torch.Tensor) -> torch.Tensor:
                options = {"ignore_index": ctx.ignored, "reduction": "sum"}
                return F.cross_entropy(x.float(), labels, **options)

            return *gradients_again(function, [logits], grad), None, None
        found = torch.empty_like(logits)
        for x, y, out in _pieces(logits, labels, found):
            probabilities = x.float().softmax(-1)
            hidden = y == ctx.ignored
            label = y.masked_fill(hidden, 0)[:, None]
            probabilities.scatter_add_(1, label, probabilities.new_full(label.shape, -1.0))
            factor = grad.masked_fill(hidden, 0)[:, None]
            out.copy_(probabilities.mul_(factor))
        return found, None, None


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Some rows of tensors at a time, for logits (N, V) as the first."""
    rows = max(1, LOGITS_AT_A_TIME // tensors[0].shape[1])
    return zip(*(x.split(rows) for x in tensors))


def span_loss(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor,
    end_positions: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean of the losses of a span's first and last token, (B, L) logits and (B,) positions.

    Positions at or behind the row's end, of answers that were cut off, do not count.
    """
    losses, length = [], start_logits.shape[1]
    ends = {
        "start_positions": (start_logits, start_positions),
        "end_positions": (end_logits, end_positions),
    }
    for name, (logits, positions) in ends.items():
        check_tensors(**{name: positions})
        check_integers(name, positions)
        positions = positions.long()
        positions = torch.where(positions >= length, IGNORED, positions).to(logits.device)
        positions = positions[:, 0] if positions.shape[1:] == (1,) else positions
        positions = check_labels(name, positions, logits.shape[:1], length)
        kind = PROBLEM_TYPES[0]
        losses.append(classification_loss(logits, positions, kind, num_items_in_batch) / 2)
    return losses[0] + losses[1]


def pixel_loss(
    reconstruction: torch.Tensor,
    pixel_values: torch.Tensor,
    mask: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean absolute error over the pixels of the masked patches.

    Args:
        reconstruction: (B, channels, height, width).
        pixel_values: the images, likewise.
        mask: (B, rows, columns), True for masked patches.
        num_items_in_batch: masked patches of the whole accumulated batch; None for this batch's.
    """
    pixel_values, mask = (x.to(reconstruction.device) for x in (pixel_values, mask))
    channels, size = pixel_values.shape[1], pixel_values.shape[2] // mask.shape[1]
    pixels = mask.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, None]
    errors = (reconstruction.float() - pixel_values.float()).abs().masked_fill(~pixels, 0)
    items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return errors.sum() / (items * size**2 * channels)


def _items(
    labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor | int:
    """By how many items a sum of losses is divided: their number, but 1 if there is none."""
    items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return items + (items == 0)
