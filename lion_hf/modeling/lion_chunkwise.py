"""The chunk form: attention inside a chunk, states between chunks, linear in length in time and memory.

With chunk-local exclusive prefix sums F of `forward` and R of `backward`, and their sums F_end and R_end over a chunk's
edges (the one to the next chunk included), a token i receives

    from its own chunk         sum_j M_ij (q_i . k_j) v_j
    from all chunks before     exp(F_i) q_i . S           S <- exp(F_end) S + sum_j exp(F_end - F_j) k_j v_j
    from all chunks behind     exp(R_end - R_i) q_i . T   T <- exp(R_end) T + sum_j exp(R_j) k_j v_j

(arXiv 2502.16249, section 3.3, made linear). Every exponent is at most 0.
"""

import torch

from .lion_naive import decay_mask, needs_grad, prefix_sums


def chunkwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
    chunk_size: int,
) -> torch.Tensor:
    """The chunk form of the operation, with the signature that all forms share.

    Args:
        query: (B, H, L, D), already scaled.
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        forward: log-decays left to right, broadcastable to (B, H, L), or None for no decay.
        backward: log-decays right to left, likewise.
        chunk_size: tokens a chunk; the last one may be shorter. Without decay there are no chunks.

    Returns:
        (B, H, L, Dv).
    """
    if forward is None or backward is None:
        return query @ (key.transpose(-1, -2) @ value)  # one state serves every token
    queries, keys, values = (x.split(chunk_size, dim=2) for x in (query, key, value))
    forwards, backwards = (x.split(chunk_size, dim=-1) for x in (forward, backward))
    count, dtype = len(queries), query.dtype

    # With gradients the chunks' outputs are collected; without, they are written into one tensor.
    record = needs_grad(query, key, value, forward, backward)
    result = None if record else torch.empty_like(value)
    outputs = [] if record else list(result.split(chunk_size, dim=2))
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])  # (B, H, D, Dv)
    for n in range(count):
        # 1. inside the chunk
        mask = decay_mask(forwards[n], backwards[n], dtype)  # (B, H, C, C)
        output = (queries[n] @ keys[n].transpose(-1, -2) * mask) @ values[n]
        # 2. what the chunks before left in the state
        sums = prefix_sums(forwards[n])  # (B, H, C + 1)
        starts, end = sums[..., :-1], sums[..., -1:]
        output += (queries[n] * _vector(starts, dtype)) @ state
        if record:
            outputs.append(output)
        else:
            outputs[n].copy_(output)
        # 3. this chunk into the state
        state = state * _vector(end, dtype) + (keys[n] * _vector(end - starts, dtype)).transpose(-1, -2) @ values[n]

    state = torch.zeros_like(state)
    for n in reversed(range(count)):
        sums = prefix_sums(backwards[n])
        starts, end = sums[..., :-1], sums[..., -1:]
        # 4. what the chunks behind left, then this chunk into the state
        outputs[n] += (queries[n] * _vector(end - starts, dtype)) @ state
        state = state * _vector(end, dtype) + (keys[n] * _vector(starts, dtype)).transpose(-1, -2) @ values[n]
    return torch.cat(outputs, dim=2) if record else result


def _vector(log_decay: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(..., C) log-decays to factors (..., C, 1)."""
    return log_decay.to(dtype).exp().unsqueeze(-1)
