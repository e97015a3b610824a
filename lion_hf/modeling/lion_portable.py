"""The chunk form in plain tensor operations for any length, without a loop.

Programs that leave torch or this package are made of it: torch.onnx.export, and in
`portable_export` any torch.export, traces it in place of the operator of lion_chunkwise.py, which
only a Python process with this code has. torch.func, which cannot look into that operator,
transforms it. All chunks are computed at once. What the states pass on from chunk to chunk is one
(N, N) product over the N chunks, the only part that is not linear in length; an L x L matrix of
scores has chunk size^2 / (2 D) times as many multiplications.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .lion_naive import decay_mask
from .lion_numerics import compute_type, has_tangent, in_transform, prefix_sums

# The most tokens of a chunk, unless the call says how many.
PORTABLE_CHUNK_SIZE = 64

_portable = False


@contextlib.contextmanager
def portable_export() -> Iterator[None]:
    """Lets torch.export make programs without operators of this package, for ONNX and C++.

    Dynamic dimensions must be `torch.export.Dim.DYNAMIC` or `AUTO`: torch cannot prove what it asks
    of named ones. Inside torch.onnx.export it is always so.

    Example:
        >>> with lion_hf.portable_export():
        ...     program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes)
    """
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before


def needs_plain_operations(*tensors: torch.Tensor) -> bool:
    """Whether an operator of ours will not do.

    So it is in portable programs, for tensors inside a transform of torch.func, and for those that
    carry a derivative along (torch.autograd.forward_ad).
    """
    if torch.compiler.is_compiling():
        portable = _portable or torch.onnx.is_in_onnx_export()
        return torch.compiler.is_exporting() and portable
    return any(in_transform(x) or has_tangent(x) for x in tensors)


def chunks_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor,
    right_to_left: torch.Tensor,
    scale: float,
    chunk_size: int | None,
) -> torch.Tensor:
    """The chunk form with decays for one reading order, as `lion_chunkwise.chunkwise`."""
    length, dtype = query.shape[2], compute_type(value)
    query, key, value = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    edges = [x.expand(*x.shape[:-1], length) for x in (left_to_right, right_to_left)]
    count, size = _chunks(length, chunk_size)
    rest = count * size - length
    q, k, v = (  # (B, H, N, C, D or Dv)
        F.pad(x, (0, 0, 0, rest)).unflatten(2, (count, size)) for x in (query, key, value)
    )
    edges = [F.pad(x, (0, rest)).unflatten(-1, (count, size)) for x in edges]
    left, right = map(prefix_sums, edges)  # (B or 1, H or 1, N, C + 1)
    left, left_end, right, right_end = *_split_end(left), *_split_end(right)

    # 1. inside the chunks
    output = (q @ k.mT * decay_mask(edges[0], edges[1], dtype)) @ v
    # 2. what each chunk writes into the states, (B, H, N, D, Dv)
    written_left = (k * _factor(left_end - left, dtype)).mT @ v
    written_right = (k * _factor(right, dtype)).mT @ v
    # 3. the states that reach each chunk through all chunks in between
    pass_left, pass_right = _exponents_between(left_end, right_end)
    state_left, state_right = (
        (exponents.to(dtype).exp() @ written.flatten(-2)).unflatten(-1, written.shape[-2:])
        for exponents, written in ((pass_left, written_left), (pass_right, written_right))
    )
    # 4. from the chunks before and from the chunks behind
    output = (
        output
        + (q * _factor(left, dtype)) @ state_left
        + (q * _factor(right_end - right, dtype)) @ state_right
    )
    return output.flatten(2, 3)[:, :, :length]


def _chunks(length: int, chunk_size: int | None) -> tuple[int, int]:
    """How many chunks, and the tokens of each.

    Neither may be 1 in a trace for any length, which would then hold for that number alone, nor may
    the last chunk be full. So unless the call says how many tokens, both are even there, all chunks
    are about equally full, and there is always some room.
    """
    size = chunk_size or PORTABLE_CHUNK_SIZE
    count = (length + size - 1) // size
    if statically_known_true(count == 1) or statically_known_true(count > 1):
        return count, size
    if chunk_size is not None:
        return count + 1, size  # an empty one more
    count = 2 * (1 + length // (2 * size))
    return count, 2 * (1 + length // (2 * count))


def _split_end(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums before each token, and the one at the end."""
    return sums[..., :-1], sums[..., -1:]


def _exponents_between(
    left_end: torch.Tensor, right_end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-decays from the chunks that write to those that read, (..., N to, N from), or -inf."""
    left, right = prefix_sums(left_end[..., 0]), prefix_sums(right_end[..., 0])  # (..., N + 1)
    places = torch.arange(left_end.shape[-2], device=left_end.device)
    before = places[:, None] > places  # (to, from)
    return (
        torch.where(before, left[..., :-1, None] - left[..., None, 1:], -torch.inf),
        torch.where(before.mT, right[..., None, :-1] - right[..., 1:, None], -torch.inf),
    )


def _factor(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return exponents.to(dtype).exp()[..., None]
