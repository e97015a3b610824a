"""One row in several processes: each holds a piece, and they exchange states at the borders.

Within `sequence_parallel` every layer gathers, from all ranks, what their pieces send across the
borders (see lion_borders.py): one matrix of head_dim x head_dim numbers per head and direction,
whatever the length. A convolution also needs the tokens beside the borders. Everything else in a
layer is per token. In the backward pass the gradients of the states go the same way back.
"""

import contextlib
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import distributed

from .lion_borders import (
    BorderState,
    PieceStates,
    mix_piece,
    operands_of,
    state_to_the_left,
    state_to_the_right,
)
from .lion_convolution import LionConvolution


@contextlib.contextmanager
def sequence_parallel(
    model: torch.nn.Module, group: "distributed.ProcessGroup | None" = None
) -> Iterator["SequenceRanks"]:
    """Within it, the rows of a text model are pieces of longer rows, in the order of the ranks.

    Every rank of the group calls the model with its piece of the same rows, and runs the backward
    pass if one does. Pieces may have different lengths. Outputs are those of the piece's tokens.
    The sum of the ranks' losses has the gradient of the whole, which is the sum of the ranks'
    gradients. With learned positions, give `position_ids`. `pooler_output` knows only the piece.

    Args:
        model: a model with a LION encoder for text, changed while the context lasts.
        group: the processes that share a row; None: all.

    Raises:
        ValueError: for another model, or if torch.distributed has not been started. In the forward
            pass, for padding, several documents in a row, attention maps, score dropout, or a piece
            shorter than what a convolution sees of a neighbour.

    Example:
        >>> with sequence_parallel(model) as ranks:
        ...     piece = ranks.piece_of(input_ids.shape[1])
        ...     states = model(input_ids[:, piece]).last_hidden_state
    """
    attentions: list[Any] = [module for module in model.modules() if hasattr(module, "ranks")]
    config = getattr(model, "config", None)
    if not attentions or getattr(config, "modality", None) != "text":
        raise ValueError(f"{type(model).__name__}: expected a model with a LION encoder for text")
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError("torch.distributed is not started: expected init_process_group before")
    ranks = SequenceRanks(group)
    for attention in attentions:
        attention.ranks = ranks
    try:
        yield ranks
    finally:
        for attention in attentions:
            attention.ranks = None


def piece_of_rank(length: int, rank: int, count: int) -> slice:
    """The tokens of a row that one of `count` ranks holds: as many as the others, or one more."""
    return slice(rank * length // count, (rank + 1) * length // count)


class SequenceRanks:
    """The processes that share a row.

    Args:
        group: of torch.distributed; None: all processes.
    """

    def __init__(self, group: "distributed.ProcessGroup | None"):
        self.group = group
        self.rank, self.count = distributed.get_rank(group), distributed.get_world_size(group)

    def piece_of(self, length: int) -> slice:
        """This rank's tokens of a row."""
        return piece_of_rank(length, self.rank, self.count)

    def check(
        self,
        attention_mask: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        output_attentions: bool,
        attention: Any,
    ) -> None:
        """Raises ValueError for what is not possible in pieces."""
        if output_attentions:
            raise ValueError("output_attentions=True with sequence_parallel: expected False")
        if attention.training and attention.config.attention_probs_dropout_prob > 0:
            dropout = attention.config.attention_probs_dropout_prob
            raise ValueError(
                f"attention_probs_dropout_prob={dropout} with sequence_parallel: expected 0"
            )
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            raise ValueError("attention_mask has padding: expected none with sequence_parallel")
        if seq_idx is not None and bool((seq_idx != seq_idx[:, :1]).any()):
            raise ValueError("seq_idx has several documents: expected one with sequence_parallel")

    def attend(self, attention: Any, inputs: torch.Tensor) -> torch.Tensor:
        """What `attention` gives for this rank's tokens, (B, L, hidden)."""
        config = attention.config
        reach = config.conv_reach if config.conv_placement == "projections" else 0
        seen, inside = self._with_neighbours(inputs, reach)
        operands = operands_of(attention, seen, inside, "qkv")
        sent = operands.sent()
        states = PieceStates(state_to_the_right(*sent), state_to_the_left(*sent))
        return attention.merge(mix_piece(config, operands, self.around(states)))

    def convolve(self, conv: LionConvolution, inputs: torch.Tensor) -> torch.Tensor:
        """What a convolution of this text model gives for this rank's tokens, (B, L, hidden)."""
        seen, inside = self._with_neighbours(inputs, conv.weight.shape[-1] // 2)
        return conv(seen)[:, inside]

    def around(self, own: PieceStates) -> PieceStates:
        """The states that reach this rank's piece, from what its piece sends in both directions.

        Args:
            own: `state_to_the_right` and `state_to_the_left` of the piece.
        """
        right, left = own
        assert right is not None and left is not None  # every piece sends both
        parts = [right.key_value.flatten(), left.key_value.flatten()]
        if right.log_decay is not None:
            parts.append(right.log_decay.flatten().to(right.key_value.dtype))
        # in one tensor, so that every rank takes part in its backward pass
        gathered = self._gather(torch.cat(parts))
        sizes = [part.numel() for part in parts]
        states: list[tuple[BorderState, BorderState]] = []
        for row in gathered:
            pieces = row.split(sizes)
            decay = None if right.log_decay is None else pieces[2].view_as(right.log_decay)
            both = [BorderState(x.view_as(right.key_value), decay) for x in pieces[:2]]
            states.append((both[0], both[1]))
        before = [state for state, _ in states[: self.rank]]
        behind = [state for _, state in states[: self.rank : -1]]
        return PieceStates(_joined(before), _joined(behind))

    def _with_neighbours(self, inputs: torch.Tensor, reach: int) -> tuple[torch.Tensor, slice]:
        """The inputs with `reach` tokens of both neighbours, and where the piece is in them."""
        length = inputs.shape[1]
        if not reach or self.count == 1:
            return inputs, slice(0, length)
        if length < reach:
            raise ValueError(
                f"a piece of {length} tokens: expected at least {reach}, which a convolution with"
                f" conv_kernel_size={2 * reach + 1} sees of a neighbour"
            )
        edges = self._gather(torch.stack([inputs[:, :reach], inputs[:, -reach:]]))
        parts, start = [inputs], 0
        if self.rank > 0:
            parts, start = [edges[self.rank - 1, 1], *parts], reach
        if self.rank + 1 < self.count:
            parts.append(edges[self.rank + 1, 0])
        return torch.cat(parts, dim=1), slice(start, start + length)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, (ranks, ...)."""
        return _Gather.apply(x, self.group)


def _joined(states: list[BorderState]) -> BorderState | None:
    """What several pieces send together, the farthest first."""
    return reduce(BorderState.then, states) if states else None


class _Gather(torch.autograd.Function):
    """All ranks' tensors; its gradient is the sum of what all ranks make of this rank's."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: "distributed.ProcessGroup | None") -> torch.Tensor:
        ctx.group = group
        gathered = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(gathered, x.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad, group=ctx.group)
        return grad[distributed.get_rank(ctx.group)], None
