"""`lion_attention`, the operation: checks, the table of forms, and the choice of a form."""

import os
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .lion_checks import check_operation, has_values, values_known
from .lion_chunkwise import chunkwise, default_chunk_size
from .lion_naive import (
    FEATURE_MAPS,
    LOG_ZERO,
    attention_weights,
    compute_type,
    decay_mask,
    full_precision,
    needs_grad,
    recurrent,
)
from .lion_packing import nearest_token
from .lion_portable import needs_plain_operations

# Triton is looked for only where the kernels run: on NVIDIA's GPUs, or in its interpreter, which takes tensors on the CPU too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DTYPES = ()
if INTERPRETED or (torch.cuda.is_available() and torch.version.hip is None):
    try:
        from .lion_triton import DTYPES as TRITON_DTYPES
        from .lion_triton import (
            LARGEST_HEAD,
            LONGEST_CHUNK_OF_ORDERS,
            fused_chunkwise,
            fused_features,
            fused_forward,
            fused_recurrent,
        )
    except ImportError:
        pass

Direction = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # order, forward, backward


def lion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    feature_map: str = "identity",
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    form: str = "auto",
    chunk_size: int | None = None,
    need_weights: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional linear attention with decay, in any of its equal forms.

    `y_i = sum_j M_ij (q_i . k_j) v_j`, divided by `sum_j M_ij (q_i . k_j) + eps` if `normalize`, where `M_ij` is the product
    of the gates from the source j (its own included) to the target i (its own excluded), and `M_ii = 1`
    (arXiv 2502.16249, section 3). The layout is that of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (B, H, L, D), any strides.
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        log_decay: logarithms of the tokens' gates, at most 0 (`-inf` is a gate of 0). One of
            - None: no decay, LION-lit;
            - (B or 1, H or 1, L or 1): one gate a token, LION-D and LION-S;
            - with `order`: (K, B or 1, H or 1, L or 1), gates of the K orders, tokens numbered as in `query`;
            - a pair (forward, backward), each (B or 1, H or 1, L): log-decays of the edges t -> t+1 and t+1 -> t at index t,
              taken as they are, those beside padding too.
        attention_mask: (B, L), nonzero for tokens and zero for padding. A masked token is transparent: the others get what
            they would get if it were removed, and it gets 0.
        seq_idx: (B or 1, L), integers that change where a new document begins. No document sees another.
        order: (K, L), K permutations; the mask is the mean of the masks along each. See `snake_orders`. An order must keep
            every document of `seq_idx` in one piece.
        feature_map: what query and key go through first: "identity", "elu_plus_one" (x + 1 above 0, exp(x) below), or
            "normalized_silu" (silu(x) + 0.5, then of unit length); computed in float32 at least.
        scale: factor of the scores; D ** -0.5 if None.
        normalize: divide by the sum of the masked scores.
        eps: added to that sum; above 0.
        dropout_p: probability of dropping a masked score. Needs the attention form. Kernels and torch draw differently.
        form: "auto", "attention", "recurrent" or "chunk".
        chunk_size: tokens a chunk in the chunk form; chosen if None. Without decay that form needs no chunks.
        need_weights: also return the mixing matrix, by the attention form.
        backend: "torch", "triton" for the fused kernels, or "auto", which takes the kernels on a CUDA GPU wherever they
            serve: for float32, bfloat16 and float16 (`value`'s type is that of the matrix products), heads of 1 to 256
            numbers, without `need_weights`, in the recurrent form without gradients, and outside torch.func's transforms
            and `portable_export`.

    Returns:
        (B, H, L, Dv) in the type of `value`; with `need_weights` a pair of it and the weights, (B, H, L, L).

    A token that is not finite reaches its whole row and head, other documents of `seq_idx` included, and no other.

    Raises:
        ValueError: for an unknown form or feature map, a shape, type or device that does not fit, a number out of range,
            dropout in a form that keeps no scores, or a backend that cannot serve the call. On the CPU, where looking costs
            nothing, also for gates above 1, orders that are no permutations, and masks with negative entries (real ones
            everywhere).
    """
    if form not in ATTENTION_FORMS:
        raise ValueError(f"form={form!r}: expected one of {ATTENTION_FORMS}")
    if feature_map not in tuple(FEATURE_MAPS):
        raise ValueError(f"feature_map={feature_map!r}: expected one of {tuple(FEATURE_MAPS)}")
    check_operation(query, key, value, log_decay, attention_mask, seq_idx, order, scale, normalize, eps, dropout_p, chunk_size)
    if dropout_p > 0 and form not in ("auto", "attention"):
        raise ValueError(
            f"dropout_p={dropout_p} with form={form!r}: only 'attention' (which 'auto' then picks) keeps scores to drop;"
            " set dropout_p (attention_probs_dropout_prob in the config) to 0 to use this form in training"
        )
    length, head_dim = query.shape[-2:]
    if form == "auto":
        decays = log_decay is not None or seq_idx is not None
        gradients = needs_grad(query, key, value, *(log_decay if isinstance(log_decay, tuple) else (log_decay,)))
        scores = need_weights or dropout_p > 0
        form = choose_form(length, head_dim, decays, scores, query.device.type, gradients).form
    refusal = _triton_refusal(query, key, value, log_decay, form, need_weights)
    if backend not in BACKENDS or (backend == "triton" and refusal is not None):
        raise ValueError(f"backend={backend!r}: " + (refusal if backend in BACKENDS else f"expected one of {BACKENDS}"))
    fused = refusal is None and (backend == "triton" or (backend == "auto" and query.is_cuda))
    scale = head_dim**-0.5 if scale is None else scale
    mask = None if attention_mask is None else attention_mask != 0
    if mask is not None and values_known(mask) and mask.all():
        mask = None  # spares three copies; on a GPU looking would wait for it
    dtype = compute_type(value)

    with full_precision(value):
        log_decay = _map(lambda x: x.to(dtype).clamp(min=LOG_ZERO[dtype]), log_decay)
        directions = _directions(log_decay, mask, seq_idx, order, length)
        scans = FUSED_SCANS if fused else SCANS
        if fused and feature_map != "identity":
            query, key = (fused_features(x, None, mask, feature_map, value.dtype) for x in (query, key))
        if fused and not _apart(form, directions, length, chunk_size):
            return _fuse(query, key, value, mask, directions, scale, normalize, eps, dropout_p, form, chunk_size)
        hidden = None if mask is None else ~mask[:, None, :, None]
        inputs = _without_padding(hidden, query, key, value)
        if feature_map != "identity" and not fused:
            features = (FEATURE_MAPS[feature_map](x.to(dtype)).to(value.dtype) for x in inputs[:2])
            inputs = (*_without_padding(hidden, *features), inputs[2])
        weights = None
        if need_weights or form == "attention":
            weights = _weights(*(x.to(dtype) for x in inputs[:2]), directions, scale, normalize, eps)
        if form == "attention":
            output = F.dropout(weights, dropout_p) @ inputs[2].to(dtype)
        else:
            output = _scan(scans[form], *inputs, directions, scale, normalize, eps, chunk_size)
        if value.dtype == torch.float16:  # sums that are not normalised may leave its range
            limit = torch.finfo(torch.float16).max
            output, weights = (None if x is None else x.clamp(-limit, limit) for x in (output, weights))
        output = output.to(value.dtype)
    return (output, weights.to(value.dtype)) if need_weights else output


# The forms that carry states, all with the signature of `recurrent`. The attention form is the third: it multiplies by the
# weights themselves, which it can drop out and return.
SCANS = {"recurrent": recurrent, "chunk": chunkwise}
FUSED_SCANS = {"recurrent": fused_recurrent, "chunk": fused_chunkwise} if TRITON_DTYPES else {}
FORMS = ("attention", *SCANS)
ATTENTION_FORMS = ("auto", *FORMS)
BACKENDS = ("auto", "torch", "triton")


class Choice(NamedTuple):
    """What "auto" stands for, and why."""

    form: str
    reason: str


# What "auto" stands for: the first row that fits. `CHUNK_SIZES` in lion_chunkwise.py goes on from here.
# Source: benchmarks/results/chunks-cpu.md and chunks-cpu-bfloat16.md (12 heads of 64, 1 and 16 rows).
AUTO_FORMS = (
    # gates, gradients (None: with or without), device ("": any), longest row in tokens for a head's size, form, why
    (False, None, "", lambda head_dim: head_dim - 1, "attention", "without decay a row below head_dim costs least as scores"),
    (False, None, "", None, "chunk", "without decay one state of size head_dim x head_dim serves the whole row"),
    (True, False, "cpu", lambda _: 16, "attention", "up to 16 tokens it takes 0.8 to 1.1 times one chunk's time"),
    (True, True, "cpu", lambda _: 64, "attention", "up to 64 tokens it trains in 0.7 to 1.1 times one chunk's time"),
    (True, None, "", None, "chunk", "it is the fastest of all but short rows"),
)


def choose_form(
    length: int,
    head_dim: int,
    decays: bool = True,
    scores: bool = False,
    device_type: str = "cpu",
    gradients: bool = False,
) -> Choice:
    """The form that "auto" stands for; how many tokens its chunks have is in `CHUNK_SIZES` of lion_chunkwise.py.

    The data type does not enter: the measured crossovers of float32 and bfloat16 are nearly the same.

    Args:
        length: tokens a row.
        head_dim: size of a head.
        decays: whether there are gates, or documents, which gates of 0 keep apart.
        scores: whether the scores themselves are needed, for attention maps or dropout.
        device_type: as in `torch.device.type`.
        gradients: whether there will be a backward pass.
    """
    if scores:
        return Choice("attention", "maps and score dropout (attention_probs_dropout_prob in training) need the scores")
    for gates, training, device, longest, form, reason in AUTO_FORMS:
        fits = gates == decays and training in (None, gradients) and device in ("", device_type)
        # a traced length may stand for any
        if fits and (longest is None or (not torch.compiler.is_compiling() and length <= longest(head_dim))):
            return Choice(form, reason)
    raise AssertionError("the last row of AUTO_FORMS fits everything")


def explain(config, length: int, device: str = "cpu", training: bool = False, output_attentions: bool = False) -> str:
    """Says in which form a model computes rows of a length, and why.

    Args:
        config: a `LionConfig` or a model.
        length: tokens a row, the class token of an image included.
        device: the device, such as "cpu" or "cuda:0".
        training: whether the model is in training mode.
        output_attentions: whether attention maps are asked for.

    Raises:
        ValueError: for something else than a configuration or model, a length below 1, or a device that torch does not know.

    Example:
        >>> print(lion_hf.explain(model, 4096))
        4096 tokens on cpu: chunk form, because it is the fastest of all but short rows; 32 chunks of 128 tokens, because ...
    """
    config = getattr(config, "config", config)
    if getattr(config, "model_type", None) != "lion":
        raise ValueError(f"config is a {type(config).__name__}: expected a LionConfig or one of its models")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"length={length!r}: expected an integer of at least 1")
    try:
        device = torch.device(device).type
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device={device!r}: expected a device of torch, such as 'cpu' or 'cuda'") from error
    dropout = config.attention_probs_dropout_prob if training else 0.0
    decays = config.mask_type != "lit"
    form, reason = choose_form(length, config.head_dim, decays, output_attentions or dropout > 0, device, training)
    if config.attention_form != "auto" and not output_attentions:
        form, reason = config.attention_form, f"attention_form={config.attention_form!r} is set"
    answer = f"{length} tokens on {device}: {form} form, because {reason}"
    if form == "chunk" and decays:
        size, reason = default_chunk_size(length, device)
        if config.chunk_size is not None:
            size, reason = config.chunk_size, f"chunk_size={config.chunk_size} is set"
        count = -(-length // size)
        answer += f"; {count} chunk{'s' * (count > 1)} of {min(size, length)} tokens, because {reason}"
    return answer


def _triton_refusal(query, key, value, log_decay, form: str, need_weights: bool) -> str | None:
    """Why the fused kernels cannot serve a call, or None if they can."""
    pair = isinstance(log_decay, tuple)
    inputs = (query, key, value)
    if not TRITON_DTYPES:
        return "triton was not found, or no CUDA device; expected both, or TRITON_INTERPRET=1 in the environment"
    if not (query.is_cuda or INTERPRETED) or (query.is_cuda and torch.cuda.get_device_properties(query.device).major < 8):
        return f"tensors on {query.device}: expected a CUDA device of compute capability 8.0 or above"
    if any(x.dtype not in TRITON_DTYPES for x in inputs):
        return f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}: expected types of {TRITON_DTYPES}"
    if not all(0 < x.shape[-1] <= LARGEST_HEAD for x in inputs):
        return f"heads of {query.shape[-1]} and {value.shape[-1]}: expected sizes from 1 to {LARGEST_HEAD}"
    if needs_plain_operations(*inputs, *(x for x in (log_decay if pair else (log_decay,)) if x is not None)):
        return "the kernels are no plain operations: expected neither a torch.func transform nor a portable export"
    if need_weights:
        return "need_weights=True needs stored scores, which the kernels do not keep: expected False"
    if form == "recurrent" and needs_grad(*inputs, *(log_decay if pair else (log_decay,))):
        return "form='recurrent' with gradients: expected 'attention' or 'chunk', or no gradients"
    return None


def _apart(form: str, directions: list[Direction], length: int, chunk_size: int | None) -> bool:
    """Whether the kernels run each order on its own: always in the recurrent form, and in the chunk form with states."""
    ordered = directions[0][0] is not None
    return form == "recurrent" or (form == "chunk" and ordered and length > (chunk_size or LONGEST_CHUNK_OF_ORDERS))


def _fuse(
    query, key, value, mask, directions: list[Direction], scale, normalize, eps, dropout_p, form, chunk_size
) -> torch.Tensor:
    """The attention and the chunk form by the fused kernels, which know padding and, in one chunk, orders and dropout."""
    order, forward, backward = (
        None if x[0] is None else x[0][None] if len(x) == 1 else torch.stack(x) for x in zip(*directions)
    )
    chunk_size = chunk_size if form == "chunk" and order is None else query.shape[2]
    order = None if order is None else order.long().contiguous()  # one that is not stacked has the caller's type and strides
    seed = torch.randint(2**62, (1,), device=query.device) if dropout_p > 0 else None
    others = (forward, backward, order, mask, seed, dropout_p)
    return fused_forward(query, key, value, *others, scale, normalize, eps, chunk_size, value.dtype)[0]


def _without_padding(hidden: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensors if hidden is None else tuple(x.masked_fill(hidden, 0) for x in tensors)


def _weights(query, key, directions: list[Direction], scale: float, normalize: bool, eps: float) -> torch.Tensor:
    """The mixing matrix of the attention form, (B, H, L, L), with every order's mask brought back to the tokens' order."""
    masks, length = [], query.shape[2]
    for order, forward, backward in directions:
        mask = None
        if forward is not None:
            mask = decay_mask(*(x.expand(*x.shape[:-1], length) for x in (forward, backward)), query.dtype)
        if mask is not None and order is not None:
            inverse = order.argsort()
            mask = mask[..., inverse[:, None], inverse[None, :]]
        masks.append(mask)
    weights = attention_weights(query * scale, key, masks)
    return weights / (weights.sum(-1, keepdim=True) + eps) if normalize else weights


def _scan(function, query, key, value, directions: list[Direction], scale, normalize, eps, chunk_size) -> torch.Tensor:
    """A form with states. The divisor is one more column of the values; orders are permuted, run and added up."""
    if normalize:
        value = F.pad(value, (0, 1), value=1.0)  # a masked key is 0, so a masked token adds nothing to the divisor
    orders, *decays = zip(*directions)
    if (
        function is chunkwise
        and orders[0] is not None
        and not needs_plain_operations(query, key, value, *decays[0])  # whose programs shall serve any size
        and query.shape[2] <= (chunk_size or default_chunk_size(query.shape[2], query.device.type)[0])
    ):  # one matrix of scores for all orders
        total = function(query, key, value, *map(torch.stack, decays), scale, chunk_size, torch.stack(orders))
    else:
        total = None
        for order, forward, backward in directions:
            inputs = (query, key, value) if order is None else (x.index_select(2, order) for x in (query, key, value))
            output = function(*inputs, forward, backward, scale / len(directions), chunk_size)
            if order is not None:
                output = output.index_select(2, order.argsort())
            total = output if total is None else total + output
    return total[..., :-1] / (total[..., -1:] + eps) if normalize else total


def _directions(log_decay, mask, seq_idx, order, length: int) -> list[Direction]:
    """For each order its permutation and the log-decays of its edges, (B or 1, H or 1, L, or 1 if they are all the same)."""
    if log_decay is None and seq_idx is None:
        return [(None, None, None)]  # without decays every order gives the same
    boundary = _boundaries(mask, seq_idx)
    if isinstance(log_decay, tuple):
        return [(None, *_cut(*torch.broadcast_tensors(*log_decay), boundary))]
    if log_decay is None:
        log_decay, order = torch.zeros(1, 1, length, device=seq_idx.device), None
    if log_decay.shape[-1] == 1 and mask is None and seq_idx is None:  # the gate of every edge in every order
        return [(None, log_decay, log_decay)] if order is None else [(o, x, x) for o, x in zip(order, log_decay)]
    log_decay = log_decay.expand(*log_decay.shape[:-1], length)
    if mask is not None:
        log_decay = log_decay.masked_fill(~mask[:, None, :], 0)
    if order is None:
        return [(None, *_cut(log_decay, _backward(log_decay), boundary))]
    directions = []
    for permutation, gates in zip(order, log_decay):
        gates, step_mask, step_idx = (None if x is None else x.index_select(-1, permutation) for x in (gates, mask, seq_idx))
        step_boundary = _boundaries(step_mask, step_idx)
        known = boundary is not None and has_values(boundary) and has_values(step_boundary)
        if known and (step_boundary.sum(-1) != boundary.sum(-1)).any():
            raise ValueError("order interleaves the documents of seq_idx: expected each document's tokens in one piece")
        directions.append((permutation, *_cut(gates, _backward(gates), step_boundary)))
    return directions


def _backward(gates: torch.Tensor) -> torch.Tensor:
    """Log-decays of the edges t+1 -> t: the gate of token t+1."""
    # without a slice, whose length of one a program for any length would refuse
    return F.pad(gates, (-1, 1)) if gates.shape[-1] else gates


def _cut(forward, backward, boundary) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts both edges between documents."""
    if boundary is None:
        return forward, backward
    boundary = boundary[:, None, :]  # (B or 1, 1, L)
    cut = LOG_ZERO[forward.dtype]
    return forward.masked_fill(boundary, cut), backward.masked_fill(boundary, cut)


def _boundaries(mask, seq_idx) -> torch.Tensor | None:
    """(B or 1, L): whether the edge t -> t+1 joins two documents. Padding belongs to the token before it, or to the first."""
    if seq_idx is None:
        return None
    if mask is not None:
        seq_idx = seq_idx.expand(mask.shape[0], -1).gather(-1, nearest_token(mask))
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1))


def _map(function, log_decay):
    """Applies a function to the log-decays, whichever of their three kinds they are."""
    if log_decay is None:
        return None
    return tuple(map(function, log_decay)) if isinstance(log_decay, tuple) else function(log_decay)
