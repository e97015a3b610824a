"""The definition of LION in plain torch: the attention and the recurrent form.

They are the references of every faster path. For one head, with scores s_ij = query_i . key_j and
decays on the edges between neighbouring tokens,

    y_i = sum_j M_ij s_ij value_j

    M_ij = exp(left_to_right[j] + ... + left_to_right[i-1])    j < i
    M_ii = 1
    M_ij = exp(right_to_left[i] + ... + right_to_left[j-1])    j > i

`left_to_right[t]` is the log-decay on the edge t -> t+1 and `right_to_left[t]` the one on the edge
t+1 -> t (arXiv 2502.16249, section 3). Both are (..., L); their last entry belongs to no edge and
is not read. `None` stands for no decay.
"""

import torch
from torch.nn import functional as F

from .lion_numerics import compute_type, needs_grad, prefix_sums

EXPONENT_LIMIT, EXPONENTIAL_SCALE = 10.0, 1 / 16  # of the map `exponential`


def _elu_plus_one(x: torch.Tensor) -> torch.Tensor:
    """exp(x) below 0, x + 1 above.

    `F.elu(x) + 1` would do, but near -1 half precision would round features below 0.002 to 0.
    """
    if needs_grad(x):
        above = F.relu(x)
        return (x - above).exp() + above  # the gradient at 0 is 1; that of a clamp would be 0
    return x.clamp(max=0).exp_().add_(F.relu(x))


def _normalized_silu(x: torch.Tensor) -> torch.Tensor:
    """silu(x) + 0.5, scaled to unit length."""
    features = F.silu(x).add_(0.5)
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp(min=1e-12)
    return features / norm if needs_grad(x) else features.div_(norm)


def _sqrt_softmax(x: torch.Tensor) -> torch.Tensor:
    """exp(x / 2), scaled to unit length: the square roots of a softmax over the features.

    So the score of a query and a key is the overlap of two distributions (their Bhattacharyya
    coefficient), 1 where they are the same.
    """
    if needs_grad(x):
        return x.log_softmax(dim=-1).mul(0.5).exp()  # the gradient of a root at 0 is infinite
    return x.softmax(dim=-1).sqrt_()


def _exponential(x: torch.Tensor) -> torch.Tensor:
    """exp(x) and exp(-x), twice as many features as numbers (as in Hedgehog, arXiv 2402.04347).

    They are scaled and their exponents limited, so that scores stay in the range of float16.
    """
    x = x.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    return torch.cat([x, -x], dim=-1).exp() * EXPONENTIAL_SCALE


# By the names of `FEATURE_MAP_NAMES` in configuration_lion.py.
FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu_plus_one": _elu_plus_one,
    "normalized_silu": _normalized_silu,
    "sqrt_softmax": _sqrt_softmax,
    "exponential": _exponential,
}


def map_features(feature_map: str, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Features of queries or keys, computed in float32 at least, in the type of `like`."""
    if feature_map == "identity":
        return x
    return FEATURE_MAPS[feature_map](x.to(compute_type(like))).to(like.dtype)


def decay_mask(
    left_to_right: torch.Tensor, right_to_left: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The mask M of the definition.

    Args:
        left_to_right: log-decays, (..., L).
        right_to_left: log-decays, (..., L).
        dtype: type of the result.

    Returns:
        M, (..., L, L), with ones on the diagonal and entries in [0, 1].
    """
    length = left_to_right.shape[-1]
    # (..., i, j): at most 0 where j <= i, and where j >= i
    from_left = _differences(prefix_sums(left_to_right)[..., :length], dtype)
    from_right = _differences(prefix_sums(right_to_left)[..., :length], dtype).transpose(-1, -2)
    lower = torch.ones(length, length, dtype=torch.bool, device=left_to_right.device).tril()
    return torch.where(lower, from_left, from_right).exp_()


def _differences(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sums_i - sums_j, (..., L) to (..., L, L), computed in `dtype` but as exact as the sums.

    What rounding to `dtype` takes from the sums is added back after the large parts have cancelled.
    """
    high = sums.to(dtype)
    low = (sums - high).to(dtype).detach()
    difference = high.unsqueeze(-1) - high.unsqueeze(-2)
    return difference.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, masks: list[torch.Tensor | None]
) -> torch.Tensor:
    """Scores times the mean of the masks, before any normalisation.

    Args:
        query: (B, H, L, D), already scaled.
        key: (B, H, L, D).
        masks: one mask (..., L, L) for each reading order, in the order of the tokens; None stands
            for ones.

    Returns:
        Weights, (B, H, L, L), so that the output is `weights @ value`.
    """
    scores = query @ key.transpose(-1, -2)
    decays = [mask for mask in masks if mask is not None]
    if not decays:
        return scores
    mean = decays[0] if len(decays) == 1 else sum(decays[1:], decays[0]) / len(decays)
    return scores * mean


def recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor | None,
    right_to_left: torch.Tensor | None,
    scale: float,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """The recurrent form: two scans in one loop over the tokens, each with one state per head.

    At step t the left-to-right scan reads token t and the right-to-left scan token L-1-t. The first
    counts the diagonal, the second does not. Without gradients nothing but the two states, (D, Dv)
    per head, and the output is kept; autograd keeps every state.

    Args:
        query: (B, H, L, D).
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        left_to_right: log-decays, broadcastable to (B, H, L), or None for no decay.
        right_to_left: log-decays, likewise.
        scale: factor of the scores.
        chunk_size: not used; part of the signature that all forms with states share.

    Returns:
        (B, H, L, Dv) in float32, or in float64 if `value` is.
    """
    length, dtype = query.shape[2], compute_type(value)
    query, key, value = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    record = length > 0 and needs_grad(query, key, value, left_to_right, right_to_left)
    by_step = [x.movedim(2, 0) for x in (query, key, value)]  # (L, B, H, D or Dv)
    if left_to_right is not None and right_to_left is not None:
        for x in (left_to_right, right_to_left):
            by_step.append(x.expand(*x.shape[:2], length).exp()[..., None, None].movedim(2, 0))
    if record:  # autograd joins the pieces of an unbind in one go, those of an index one by one
        pieces: list = [x.unbind(0) for x in by_step]
    else:
        pieces = by_step
    queries, keys, values, *decays = pieces
    state_left = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    state_right = torch.zeros_like(state_left)
    parts_left, parts_right = [], []
    output = value.new_empty(0) if record else torch.zeros_like(value)
    for step in range(length):
        mirror = length - 1 - step
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
        return torch.stack(parts_left, dim=2) + torch.stack(parts_right[::-1], dim=2)
    return output
