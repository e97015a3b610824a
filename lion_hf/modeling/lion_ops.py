"""`lion_attention`, the operation: checks, the table of backends, and the choice among them."""

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from .configuration_lion import (
    ATTENTION_FORMS,
    BACKENDS,
    FEATURE_MAP_NAMES,
    FORMS_WITHOUT_SCORES,
    WIDER_FEATURE_MAPS,
)
from .lion_checks import LogDecay, check_inputs, check_numbers, gates_of
from .lion_choice import choose_form, score_dropout_error
from .lion_numerics import LOG_ZERO, compute_type, full_precision, needs_grad
from .lion_request import DIVISOR_EPS, AttentionRequest, Result, directions_of
from .lion_torch import torch_attention, torch_chunk, torch_recurrent, with_features


class Backend(NamedTuple):
    """How a backend computes a form."""

    run: Callable[[AttentionRequest], Result]
    refusal: Callable[[AttentionRequest], str | None]  # why it cannot serve a request, or None


def _serves_all(request: AttentionRequest) -> str | None:
    return None


# (backend, form) -> who serves it. What is missing here cannot be had on this machine.
TABLE = {
    ("torch", "attention"): Backend(torch_attention, _serves_all),
    ("torch", "recurrent"): Backend(torch_recurrent, _serves_all),
    ("torch", "chunk"): Backend(torch_chunk, _serves_all),
}
# Triton is looked for only where the kernels run: on NVIDIA's GPUs, or in its interpreter, which
# takes tensors on the CPU too.
if os.environ.get("TRITON_INTERPRET") == "1" or (
    torch.cuda.is_available() and torch.version.hip is None
):
    try:
        from .lion_triton import refusal, triton_attention, triton_chunk, triton_recurrent

        TABLE |= {
            ("triton", "attention"): Backend(triton_attention, refusal),
            ("triton", "recurrent"): Backend(triton_recurrent, refusal),
            ("triton", "chunk"): Backend(triton_chunk, refusal),
        }
    except ImportError:
        pass


def lion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: LogDecay = None,
    *,
    attention_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    feature_map: str = "identity",
    scale: float | None = None,
    normalize: bool = False,
    eps: float = DIVISOR_EPS,
    dropout_p: float = 0.0,
    form: str = "auto",
    chunk_size: int | None = None,
    need_weights: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional linear attention with decay, in any of its equal forms.

    `y_i = sum_j M_ij (q_i . k_j) v_j`, divided by `sum_j M_ij (q_i . k_j) + eps` if `normalize`.
    `M_ij` is the product of the gates from the source j (its own included) to the target i (its own
    excluded), and `M_ii = 1` (arXiv 2502.16249, section 3). The layout is that of
    `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (B, H, L, D), any strides.
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        log_decay: logarithms of the tokens' gates, at most 0 (`-inf` is a gate of 0). One of
            - None: no decay, LION-lit;
            - (B or 1, H or 1, L or 1): one gate per token, LION-D and LION-S;
            - with `order`: (K, B or 1, H or 1, L or 1), gates of the K orders, with tokens numbered
              as in `query`;
            - a pair (left_to_right, right_to_left), each (B or 1, H or 1, L): at index t the
              log-decays of the edges t -> t+1 and t+1 -> t. They are taken as they are, those
              beside padding too.
        attention_mask: (B, L), nonzero for tokens and zero for padding. A masked token is
            transparent: the others get what they would get if it were removed, and it gets 0.
        seq_idx: (B or 1, L), integers that change where a new document begins. No document sees
            another.
        order: (K, L), K permutations; the mask is the mean of the masks along each. See
            `snake_orders`. An order must keep every document of `seq_idx` in one piece.
        feature_map: what query and key go through first: "identity", "elu_plus_one" (x + 1 above 0,
            exp(x) below), "normalized_silu" (silu(x) + 0.5, then scaled to unit length),
            "sqrt_softmax" (exp(x / 2) scaled to unit length, the square roots of a softmax over D),
            or "exponential" (exp(x) and exp(-x), each divided by 16). It is computed in float32 at
            least.
        scale: factor of the scores; D ** -0.5 if None.
        normalize: whether to divide by the sum of the masked scores.
        eps: added to that sum; above 0.
        dropout_p: probability of dropping a masked score. It needs the attention form. Kernels and
            torch draw differently.
        form: "auto", "attention", "recurrent" or "chunk".
        chunk_size: tokens per chunk in the chunk form; chosen if None. Without decay that form
            needs no chunks.
        need_weights: whether to also return the mixing matrix, computed by the attention form.
        backend: "torch", "triton" for the fused kernels, or "auto", which takes the kernels on a
            CUDA GPU wherever they serve: for float32, bfloat16 and float16 (`value`'s type is that
            of the matrix products), heads of 1 to 256 numbers, without `need_weights`, in the
            recurrent form without gradients, and outside torch.func's transforms and
            `portable_export`.

    Returns:
        (B, H, L, Dv) in the type of `value`; with `need_weights` a pair of it and the weights,
        (B, H, L, L).

        A token that is not finite reaches its whole document and head, may reach the other
        documents of its row, and reaches no other row or head.

    Raises:
        ValueError: for an unknown form or feature map, a shape, type or device that does not fit, a
            number out of range, dropout in a form that keeps no scores, or a backend that cannot
            serve the call. On the CPU, where looking costs nothing, also for gates above 1, orders
            that are not permutations, and masks with negative entries (real ones everywhere).
    """
    if form not in ATTENTION_FORMS:
        raise ValueError(f"form={form!r}: expected one of {ATTENTION_FORMS}")
    if feature_map not in FEATURE_MAP_NAMES:
        raise ValueError(f"feature_map={feature_map!r}: expected one of {FEATURE_MAP_NAMES}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    check_numbers(scale, normalize, eps, dropout_p, chunk_size)
    check_inputs(query, key, value, log_decay, attention_mask, seq_idx, order)
    if dropout_p > 0 and form in FORMS_WITHOUT_SCORES:
        raise ValueError(score_dropout_error(dropout_p=dropout_p, form=form))
    length, head_dim = query.shape[-2:]
    if scale is None:
        scale = head_dim**-0.5
    mask = None if attention_mask is None else attention_mask != 0
    if form == "auto":
        decays = log_decay is not None or seq_idx is not None
        gradients = needs_grad(query, key, value, *gates_of(log_decay))
        scores = need_weights or dropout_p > 0
        features = head_dim * (1 + (feature_map in WIDER_FEATURE_MAPS))
        form = choose_form(length, features, decays, scores, query.device.type, gradients).form
    with full_precision(value):
        dtype = compute_type(value)
        log_decay = _finite(log_decay, dtype)
        request = AttentionRequest(
            query=query,
            key=key,
            value=value,
            directions=directions_of(log_decay, mask, seq_idx, order, length, dtype),
            mask=mask,
            scale=scale,
            normalize=bool(normalize),
            eps=eps,
            dropout_p=dropout_p,
            form=form,
            chunk_size=None if chunk_size is None else min(chunk_size, sys.maxsize),
            feature_map=feature_map,
            need_weights=need_weights,
            seq_idx=seq_idx,
        )
        output, weights = _run(request, backend)
    return output if weights is None else (output, weights)


def _run(request: AttentionRequest, backend: str) -> Result:
    """Has a backend serve a request; raises ValueError if the one that was asked for cannot."""
    fused = TABLE.get(("triton", request.form))
    torch_form = TABLE["torch", request.form].run
    if backend == "torch" or (backend == "auto" and not (fused and request.query.is_cuda)):
        return torch_form(request)
    refusal: str | None = (
        "triton was not found, or no CUDA device; expected both, or TRITON_INTERPRET=1 in the"
        " environment"
    )
    if fused is not None:
        if request.feature_map in WIDER_FEATURE_MAPS:  # kernels have as many features as numbers
            request = with_features(request)
        refusal = fused.refusal(request)
        if refusal is None:
            return fused.run(request)
    if backend == "triton":
        raise ValueError(f"backend='triton': {refusal}")
    return torch_form(request)


def _finite(log_decay: LogDecay, dtype: torch.dtype) -> LogDecay:
    """The log-decays in the type of the computation, with finite numbers for gates of 0."""
    if log_decay is None:
        return None
    if isinstance(log_decay, tuple):
        left_to_right, right_to_left = (x.to(dtype).clamp(min=LOG_ZERO[dtype]) for x in log_decay)
        return left_to_right, right_to_left
    return log_decay.to(dtype).clamp(min=LOG_ZERO[dtype])
