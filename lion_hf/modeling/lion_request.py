"""The request that `lion_attention` hands to a backend, and the decays along its edges.

B is the batch, H the number of heads, L the length, D and Dv the head sizes of query and value, and
K the number of reading orders.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .lion_checks import LogDecay
from .lion_numerics import LOG_ZERO, has_values
from .lion_packing import nearest_token

DIVISOR_EPS = 1e-6  # what is added to the sum of the scores before it divides


class Directions(NamedTuple):
    """One order of reading, and the log-decays on its edges in both directions.

    The log-decays are (B or 1, H or 1, L, or 1 where all edges are the same), in reading order, or
    None without decay.
    """

    order: torch.Tensor | None  # (L,) or one per row (B, L); None for the tokens as they stand
    left_to_right: torch.Tensor | None  # index t holds the edge t -> t+1
    right_to_left: torch.Tensor | None  # index t holds the edge t+1 -> t


class AttentionRequest(NamedTuple):
    """One call of `lion_attention`, checked and with its form chosen."""

    query: torch.Tensor  # (B, H, L, D)
    key: torch.Tensor  # (B, H, L, D)
    value: torch.Tensor  # (B, H, L, Dv)
    directions: tuple[Directions, ...]  # one for each order of reading
    mask: torch.Tensor | None  # (B, L), True for tokens and False for padding
    scale: float
    normalize: bool
    eps: float
    dropout_p: float
    form: str
    chunk_size: int | None
    feature_map: str
    need_weights: bool
    seq_idx: torch.Tensor | None = None  # (B or 1, L), whose documents the decays keep apart


# The output (B, H, L, Dv) and, where they are asked for, the weights (B, H, L, L).
Result = tuple[torch.Tensor, torch.Tensor | None]


def edges_of(directions: Sequence[Directions]) -> list[torch.Tensor]:
    """The log-decays of all orders and both directions."""
    edges = [x for _, *both in directions for x in both]
    return [x for x in edges if x is not None]


def hide_padding(mask: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors (B, H, L, any) with zeros at padding."""
    if mask is None:
        return tensors
    hidden = ~mask[:, None, :, None]
    return tuple(x.masked_fill(hidden, 0) for x in tensors)


def divide(
    form: Callable[[AttentionRequest], torch.Tensor], request: AttentionRequest
) -> torch.Tensor:
    """Runs a form with states, and divides by the row sums if the request normalises.

    The divisor is one more column of the values. A masked key is 0, so that a masked token adds
    nothing to it.
    """
    if not request.normalize:
        return form(request)
    return divide_by_last(form(request._replace(value=with_divisor(request.value))), request.eps)


def with_divisor(value: torch.Tensor) -> torch.Tensor:
    """The values with a column of ones, whose sum is the divisor, (B, H, L, Dv + 1)."""
    return F.pad(value, (0, 1), value=1.0)


def divide_by_last(total: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides by the last column, (B, H, L, Dv + 1) to (B, H, L, Dv)."""
    return total[..., :-1] / (total[..., -1:] + eps)


def along_orders(
    form: Callable[..., torch.Tensor],
    operands: Sequence[torch.Tensor],
    directions: Sequence[Directions],
    scale: float,
    chunk_size: int | None,
) -> torch.Tensor:
    """The mean of a form with states over the orders of reading: permuted, run and added up.

    Args:
        form: a function with the arguments of `lion_naive.recurrent`.
        operands: query, key and value.
        directions: the orders, at least one, and their log-decays.
        scale: factor of the scores.
        chunk_size: tokens per chunk, or None.

    Returns:
        (B, H, L, Dv), in the type that `form` returns.
    """
    outputs = []
    for order, *edges in directions:
        inputs = operands if order is None else [permuted(x, order) for x in operands]
        output = form(*inputs, *edges, scale / len(directions), chunk_size)
        outputs.append(output if order is None else permuted(output, order.argsort()))
    return sum(outputs[1:], outputs[0])


def permuted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The tokens of (B, H, L, any) in an order, (L,) or one per row (B, L)."""
    if order.dim() == 1:
        return x.index_select(2, order)
    return x.gather(2, order[:, None, :, None].expand_as(x))


def each_order(form: Callable[..., torch.Tensor], request: AttentionRequest) -> torch.Tensor:
    """`along_orders` for a request."""
    operands = request.query, request.key, request.value
    return along_orders(form, operands, request.directions, request.scale, request.chunk_size)


def directions_of(
    log_decay: LogDecay,
    mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    order: torch.Tensor | None,
    length: int,
    dtype: torch.dtype,
) -> tuple[Directions, ...]:
    """The decays on the edges, from the gates of the tokens.

    Args:
        log_decay: as in `lion_attention`, finite.
        mask: (B, L), True for tokens, or None.
        seq_idx: (B or 1, L), or None.
        order: (K, L), or None.
        length: L.
        dtype: of the computation, and of the log-decays.

    Raises:
        ValueError: if an order interleaves the documents of `seq_idx`.
    """
    if log_decay is None and seq_idx is None:
        return (Directions(None, None, None),)  # without decay every order gives the same
    boundary = _boundaries(mask, seq_idx)
    if isinstance(log_decay, tuple):
        left_to_right, right_to_left = torch.broadcast_tensors(*log_decay)
        return (_cut(None, left_to_right, right_to_left, boundary),)
    if log_decay is None:
        device = None if seq_idx is None else seq_idx.device
        log_decay, order = torch.zeros(1, 1, length, dtype=dtype, device=device), None
    if log_decay.shape[-1] == 1 and mask is None and seq_idx is None:
        # one gate serves every edge in every order
        if order is None:
            return (Directions(None, log_decay, log_decay),)
        return tuple(Directions(o, x, x) for o, x in zip(order, log_decay))
    log_decay = log_decay.expand(*log_decay.shape[:-1], length)
    if mask is not None:
        log_decay = log_decay.masked_fill(~mask[:, None, :], 0)
    if order is None:
        return (_cut(None, log_decay, _right_to_left(log_decay), boundary),)
    return tuple(
        _along_order(permutation, gates, mask, seq_idx, boundary)
        for permutation, gates in zip(order, log_decay)
    )


def _along_order(
    permutation: torch.Tensor,
    gates: torch.Tensor,
    mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    boundary: torch.Tensor | None,
) -> Directions:
    """The edges of one order, for `gates` (B or 1, H or 1, L) in the order of the tokens."""
    gates = gates.index_select(-1, permutation)
    step_mask, step_idx = (
        None if x is None else x.index_select(-1, permutation) for x in (mask, seq_idx)
    )
    steps = _boundaries(step_mask, step_idx)
    if boundary is None or steps is None:
        return _cut(permutation, gates, _right_to_left(gates), steps)
    known = has_values(boundary) and has_values(steps)
    if known and (steps.sum(-1) != boundary.sum(-1)).any():
        raise ValueError(
            "order interleaves the documents of seq_idx: expected each document's tokens in one"
            " piece"
        )
    return _cut(permutation, gates, _right_to_left(gates), steps)


def _right_to_left(gates: torch.Tensor) -> torch.Tensor:
    """Log-decays on the edges t+1 -> t: the gate of token t+1."""
    # not by a slice: a program for any length would refuse one that may be empty
    return F.pad(gates, (-1, 1)) if gates.shape[-1] else gates


def _cut(
    order: torch.Tensor | None,
    left_to_right: torch.Tensor,
    right_to_left: torch.Tensor,
    boundary: torch.Tensor | None,
) -> Directions:
    """Cuts the edges between documents in both directions."""
    if boundary is None:
        return Directions(order, left_to_right, right_to_left)
    boundary = boundary[:, None, :]  # (B or 1, 1, L)
    cut = LOG_ZERO[left_to_right.dtype]
    left_to_right = left_to_right.masked_fill(boundary, cut)
    return Directions(order, left_to_right, right_to_left.masked_fill(boundary, cut))


def _boundaries(mask: torch.Tensor | None, seq_idx: torch.Tensor | None) -> torch.Tensor | None:
    """Whether the edge t -> t+1 joins two documents, (B or 1, L).

    Padding belongs to the token before it, or to the row's first token.
    """
    if seq_idx is None:
        return None
    if mask is not None and mask.shape[1]:
        seq_idx = seq_idx.expand(mask.shape[0], -1).gather(-1, nearest_token(mask))
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1))
