"""The definition of LION in plain torch: the attention and the recurrent form, the references of every faster path.

For one head, with scores s_ij = query_i . key_j and decays on the edges between neighbouring tokens,

    y_i = sum_j M_ij s_ij value_j        M_ij = exp(forward[j] + ... + forward[i-1])    j < i
                                         M_ii = 1
                                         M_ij = exp(backward[i] + ... + backward[j-1])  j > i

`forward[t]` is the log-decay on the edge t -> t+1 and `backward[t]` the one on the edge t+1 -> t (arXiv 2502.16249,
section 3). Both are (..., L); their last entry belongs to no edge and is not read. `None` stands for no decay.
"""

import contextlib

import torch
from torch.nn import functional as F

from .lion_checks import in_transform

# exp() of these is exactly 0: a cut edge (log-decay -inf) becomes one, so that differences of prefix sums stay finite.
LOG_ZERO = {torch.float64: -800.0, torch.float32: -110.0}


def full_precision(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Autocast switched off on the tensor's device: gates, prefix sums and states are never rounded to half precision."""
    # torch 2.11 cannot trace the question; torch.compile serves only devices that have autocast.
    if torch.compiler.is_compiling() or autocasts(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    device_type = tensor.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def compute_type(tensor: torch.Tensor) -> torch.dtype:
    """The type that the operation computes in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def prefix_sums(log_decay: torch.Tensor) -> torch.Tensor:
    """Exclusive prefix sums over the last dimension, (..., L) -> (..., L + 1), in float64 where the device has it.

    Differences of prefix sums cancel. In float32 a thousand tokens with gates of 0.5 would leave an error of 1e-4.
    """
    dtype = torch.float32 if log_decay.device.type == "mps" else torch.float64
    return torch.nn.functional.pad(log_decay.to(dtype).cumsum(-1), (1, 0))


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd may record what is done with the tensors, so that nothing may be written in place.

    Inside a transform of torch.func a tensor does not say what is recorded outside of it.
    """
    eager = not torch.compiler.is_compiling()
    return torch.is_grad_enabled() and any(x is not None and (x.requires_grad or (eager and in_transform(x))) for x in tensors)


def _elu_plus_one(x: torch.Tensor) -> torch.Tensor:
    """exp(x) below 0, x + 1 above. Taken from `F.elu`, near -1, half precision would round features below 0.002 to 0."""
    if needs_grad(x):
        above = F.relu(x)
        return (x - above).exp() + above  # the gradient at 0 is 1; that of a clamp would be 0
    return x.clamp(max=0).exp_().add_(F.relu(x))


def _normalized_silu(x: torch.Tensor) -> torch.Tensor:
    features = F.silu(x).add_(0.5)
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp(min=1e-12)
    return features / norm if needs_grad(x) else features.div_(norm)


FEATURE_MAPS = {"identity": lambda x: x, "elu_plus_one": _elu_plus_one, "normalized_silu": _normalized_silu}


def decay_mask(forward: torch.Tensor, backward: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask M of the definition.

    Args:
        forward: log-decays left to right, (..., L).
        backward: log-decays right to left, (..., L).
        dtype: type of the result.

    Returns:
        M, (..., L, L), with ones on the diagonal and entries in [0, 1].
    """
    length = forward.shape[-1]
    from_left = _differences(prefix_sums(forward)[..., :length], dtype)  # (..., i, j): <= 0 where j <= i
    from_right = _differences(prefix_sums(backward)[..., :length], dtype).transpose(-1, -2)  # <= 0 where j >= i
    lower = torch.ones(length, length, dtype=torch.bool, device=forward.device).tril()
    return torch.where(lower, from_left, from_right).exp_()


def _differences(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sums_i - sums_j, (..., L) to (..., L, L), as exact as in the type of the sums but computed in `dtype`.

    What rounding to `dtype` takes from the sums is added back after the large parts have cancelled.
    """
    high = sums.to(dtype)
    low = (sums - high).to(dtype).detach()
    return (high.unsqueeze(-1) - high.unsqueeze(-2)).add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))


def attention_weights(query: torch.Tensor, key: torch.Tensor, masks: list[torch.Tensor | None]) -> torch.Tensor:
    """Scores times the mean of the masks, before any normalisation.

    Args:
        query: (B, H, L, D), already scaled.
        key: (B, H, L, D).
        masks: one mask (..., L, L) for each reading order, in the order of the tokens; None stands for ones.

    Returns:
        Weights, (B, H, L, L), so that the output is `weights @ value`.
    """
    scores = query @ key.transpose(-1, -2)
    if all(mask is None for mask in masks):
        return scores
    mean = masks[0] if len(masks) == 1 else sum(masks[1:], masks[0]) / len(masks)
    return scores * mean


def recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
    scale: float,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """The recurrent form: two scans in one loop over the tokens, each with one (D, Dv) state a head.

    At step t the left-to-right scan reads token t and the right-to-left scan token L-1-t. The first counts the diagonal,
    the second does not. Without gradients nothing but the two states and the output is kept; autograd keeps every state.

    Args:
        query: (B, H, L, D).
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        forward: log-decays left to right, broadcastable to (B, H, L), or None for no decay.
        backward: log-decays right to left, likewise.
        scale: factor of the scores.
        chunk_size: not used; part of the signature that all forms share.

    Returns:
        (B, H, L, Dv) in float32, or in float64 if `value` is.
    """
    steps, dtype = range(query.shape[2]), compute_type(value)
    query, key, value = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    record = len(steps) > 0 and needs_grad(query, key, value, forward, backward)
    by_step = [x.movedim(2, 0) for x in (query, key, value)]  # (L, B, H, D or Dv)
    if forward is not None:
        by_step += [x.expand(*x.shape[:2], len(steps)).exp()[..., None, None].movedim(2, 0) for x in (forward, backward)]
    if record:  # autograd joins the pieces of an unbind in one go, those of an index one by one
        by_step = [x.unbind(0) for x in by_step]
    queries, keys, values, *decays = by_step
    state_left = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    state_right = torch.zeros_like(state_left)
    parts_left, parts_right = [], []
    output = None if record else torch.zeros_like(value)
    for step, mirror in zip(steps, reversed(steps)):
        if step and decays:
            state_left = state_left * decays[0][step - 1]
            state_right = state_right * decays[1][mirror]
        state_left = state_left + keys[step][..., :, None] * values[step][..., None, :]
        left = (queries[step][..., None, :] @ state_left).squeeze(-2)
        right = (queries[mirror][..., None, :] @ state_right).squeeze(-2)
        state_right = state_right + keys[mirror][..., :, None] * values[mirror][..., None, :]
        if record:
            parts_left.append(left)
            parts_right.append(right)
        else:
            output[:, :, step] += left
            output[:, :, mirror] += right
    if record:
        output = torch.stack(parts_left, dim=2) + torch.stack(parts_right[::-1], dim=2)
    return output
