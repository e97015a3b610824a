"""A row in pieces: the states at the borders, and attention in a piece between two of them.

All that the tokens on one side of a border send to the other side is one matrix per head. With
gates a_t, the states at the border before token p are

    left to right   S_p = sum_(j < p)  a_j a_(j+1) ... a_(p-1) k_j v_j^T     as token p reads it
    right to left   T_p = sum_(j >= p) a_p ... a_(j-1) a_j k_j v_j^T         as token p - 1 reads it

and a token i of the piece from s to e - 1 receives, beside its own piece,

    a_s ... a_(i-1) q_i S_s  +  a_(i+1) ... a_(e-1) q_i T_e

(arXiv 2502.16249, section 3.3). No exponent is above 0, so nothing overflows. Everything here is
made of operations that autograd knows.

Legend: B rows, H heads, L tokens of the piece, D and Dv head sizes of key and value.
"""

from typing import Any, NamedTuple

import torch

from .lion_chunk_parts import LOG2_E, powers_of_two
from .lion_naive import map_features
from .lion_numerics import LOG_ZERO, compute_type, full_precision, prefix_sums, saturated
from .lion_ops import lion_attention
from .lion_request import DIVISOR_EPS, divide_by_last, with_divisor

# A state sums products of so many tokens at a time, and then the sums: one sum over thousands of
# tokens would lose small terms behind large ones. So many blocks are in memory together.
BLOCK, BLOCKS = 128, 64


class BorderState(NamedTuple):
    """What some tokens on one side of a border send across it, in one direction.

    With normalisation the last column belongs to the divisor: it is the sum of the keys.

    Fields:
        key_value: sum of the products of keys and values, each decayed up to the border,
            (B, H, D, Dv), in float32, or in float64 for values in float64.
        log_decay: of a state that passes all these tokens, (B or 1, H or 1); None without decay.
    """

    key_value: torch.Tensor
    log_decay: torch.Tensor | None

    def then(self, nearer: "BorderState") -> "BorderState":
        """The state of these tokens and of others that stand between them and the border."""
        if self.log_decay is None or nearer.log_decay is None:
            return BorderState(self.key_value + nearer.key_value, None)
        passed = _powers(nearer.log_decay, self.key_value.dtype)[..., None, None]
        return BorderState(
            self.key_value * passed + nearer.key_value, self.log_decay + nearer.log_decay
        )


class PieceStates(NamedTuple):
    """The states that reach a piece at its borders; None at an end of the row."""

    left_to_right: BorderState | None  # from the tokens before the piece
    right_to_left: BorderState | None  # from the tokens behind it


class Operands(NamedTuple):
    """What the operation gets of a piece, in the type of the computation."""

    heads: dict[str, torch.Tensor]  # of q, k and v, (B, H, L, D), v with the divisor's column
    log_decay: torch.Tensor | None  # (B or 1, H, L or 1), None without decay
    dtype: torch.dtype  # of the model's values

    def sent(
        self, tokens: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What a state of these tokens is made of: keys, values and gates."""
        key, value, log_decay = self.heads["k"], self.heads["v"], self.log_decay
        if log_decay is not None and log_decay.shape[-1] > 1:
            log_decay = log_decay[..., tokens]
        return key[:, :, tokens], value[:, :, tokens], log_decay


def operands_of(attention: Any, inputs: torch.Tensor, inside: slice, parts: str) -> Operands:
    """What a `LionAttention` gives to the operation for the tokens of a piece.

    Args:
        attention: the layer's attention, of a text model.
        inputs: its input, with the neighbours that a convolution sees, (B, L and more, hidden).
        inside: the piece within them.
        parts: which of query, key and value, by their first letters; "kv" suffices for states.
    """
    config = attention.config
    heads = {
        part: x[:, :, inside] for part, x in zip(parts, attention.project(inputs, None, parts))
    }
    value = heads["v"]
    for part in parts.replace("v", ""):
        heads[part] = map_features(config.feature_map, heads[part], value)
    heads = {part: x.to(compute_type(value)) for part, x in heads.items()}
    if config.normalize_attention:
        heads["v"] = with_divisor(heads["v"])
    log_decay = attention.log_decay(inputs)
    if log_decay is not None and config.mask_type == "selective":
        log_decay = log_decay[..., inside]
    return Operands(heads, log_decay, value.dtype)


def mix_piece(config: Any, operands: Operands, around: PieceStates) -> torch.Tensor:
    """The operation on a piece as a model's `LionConfig` wants it, (B, H, L, D), in its type."""
    total = attend_in_piece(
        operands.heads["q"],
        *operands.sent(),
        around,
        scale=config.head_dim**-0.5,
        form=config.attention_form,
        chunk_size=config.chunk_size,
    )
    if config.normalize_attention:
        total = divide_by_last(total, DIVISOR_EPS)
    return saturated(total, operands.dtype)


def state_to_the_right(
    key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor | None
) -> BorderState:
    """What a piece sends to the tokens behind it.

    Args:
        key: (B, H, L, D), through its feature map.
        value: (B, H, L, Dv), with the divisor's column if there is one.
        log_decay: logarithms of the tokens' gates, (B or 1, H or 1, L or 1), or None.
    """
    sums = _sums(log_decay, key)
    return _state(key, value, sums, None if sums is None else sums[..., -1:] - sums[..., :-1])


def state_to_the_left(
    key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor | None
) -> BorderState:
    """What a piece sends to the tokens before it; arguments as in `state_to_the_right`."""
    sums = _sums(log_decay, key)
    return _state(key, value, sums, None if sums is None else sums[..., 1:])


def attend_in_piece(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor | None,
    around: PieceStates,
    *,
    scale: float,
    form: str = "auto",
    chunk_size: int | None = None,
) -> torch.Tensor:
    """The operation for the tokens of a piece, with what reaches them from outside.

    Args:
        query: (B, H, L, D), through its feature map, in the type of the computation.
        key: (B, H, L, D), likewise.
        value: (B, H, L, Dv), likewise, with the divisor's column if there is one.
        log_decay: logarithms of the tokens' gates, (B or 1, H or 1, L or 1), or None.
        around: the states at the piece's borders.
        scale: factor of the scores.
        form: as in `lion_attention`, for the piece's own tokens.
        chunk_size: as in `lion_attention`.

    Returns:
        (B, H, L, Dv), not divided.
    """
    result = lion_attention(
        query, key, value, log_decay, scale=scale, form=form, chunk_size=chunk_size
    )
    output = result[0] if isinstance(result, tuple) else result
    with full_precision(value):
        sums = _sums(log_decay, query)
        exponents: tuple[torch.Tensor | None, ...] = (None, None)
        if sums is not None:
            exponents = sums[..., :-1], sums[..., -1:] - sums[..., 1:]
        for state, exponent in zip(around, exponents):
            if state is not None:
                read = query * scale
                if exponent is not None:
                    read = read * _powers(exponent, query.dtype)[..., None]
                output = output + read @ state.key_value
    return output


def _state(
    key: torch.Tensor,
    value: torch.Tensor,
    sums: torch.Tensor | None,
    exponents: torch.Tensor | None,
) -> BorderState:
    dtype = compute_type(value)
    key, value = key.to(dtype), value.to(dtype)
    with full_precision(value):
        if sums is None or exponents is None:
            return BorderState(_sum_of_products(key, value), None)
        written = key * _powers(exponents, dtype)[..., None]
        return BorderState(_sum_of_products(written, value), sums[..., -1])


def _sum_of_products(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sum of the tokens' outer products, of (B, H, L, D) and (B, H, L, Dv) to (B, H, D, Dv)."""
    totals = []
    for keys, values in zip(key.split(BLOCK * BLOCKS, 2), value.split(BLOCK * BLOCKS, 2)):
        length = keys.shape[2] - keys.shape[2] % BLOCK
        if length:
            blocks = [x[:, :, :length].unflatten(2, (-1, BLOCK)) for x in (keys, values)]
            totals.append((blocks[0].mT @ blocks[1]).sum(2))
        if length < keys.shape[2] or not length:
            totals.append(keys[:, :, length:].mT @ values[:, :, length:])
    return totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)


def _sums(log_decay: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Exclusive prefix sums of the tokens' log-decays, (B or 1, H or 1, L + 1), or None."""
    if log_decay is None:
        return None
    log_decay = log_decay.clamp(min=LOG_ZERO[compute_type(like)])
    return prefix_sums(log_decay.expand(*log_decay.shape[:2], like.shape[2]))


def _powers(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e to the exponents, which are at most 0 but for rounding."""
    return powers_of_two((exponents * LOG2_E).clamp(max=0), dtype)
