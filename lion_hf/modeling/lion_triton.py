"""The fused GPU kernels as operators of torch, and the three forms that they serve.

One kernel sums up the log-decays. The attention form is one chunk as long as the row, and one
launch computes all of it. The chunk form adds states, which one kernel writes for every chunk and
another passes along; without decay there are states alone, or for short rows tiles alone. The
backward pass computes all of it again from the inputs and, where it divides, the output and the
divisor. A feature map is a kernel before all that. The kernels are in lion_triton_kernels.py
(matrix products) and lion_triton_scans.py. There are no atomic additions, so equal inputs give
equal gradients. Attention maps are left to the torch attention form, gradients through the
recurrent form to the torch recurrent form, and float64 to torch altogether. Second derivatives are
those of the torch chunk form.
"""

import os
from functools import partial

import torch
from torch.nn import functional as F

from .lion_chunk_parts import ChunkInputs
from .lion_chunkwise import chunks_again
from .lion_naive import FEATURE_MAPS
from .lion_numerics import compute_type, gradients_again, needs_grad, saturated
from .lion_portable import needs_plain_operations
from .lion_request import (
    AttentionRequest,
    Result,
    divide,
    each_order,
    edges_of,
    hide_padding,
)
from .lion_triton_launch import (
    LARGEST_HEAD,
    FusedCall,
    FusedInputs,
    launch_features,
    launch_recurrent,
)
from .lion_triton_parts import triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Two orders are two chunk forms on permuted copies, so they share one chunk's scores for longer
# (not measured).
LONGEST_CHUNK_OF_ORDERS = 2048


# ---- what the table of backends in lion_ops.py calls ----


def refusal(request: AttentionRequest) -> str | None:
    """Why the fused kernels cannot serve a request, or None if they can."""
    inputs = request.query, request.key, request.value
    query, _, value = inputs
    edges = edges_of(request.directions)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    modern = query.is_cuda and torch.cuda.get_device_properties(query.device).major >= 8
    if not (modern if query.is_cuda else interpreted):
        return (
            f"tensors on {query.device}: expected a CUDA device of compute capability 8.0 or above"
        )
    if any(x.dtype not in DTYPES for x in inputs):
        types = ", ".join(str(x.dtype) for x in inputs)
        return f"query, key and value are {types}: expected types of {DTYPES}"
    if not all(0 < x.shape[-1] <= LARGEST_HEAD for x in inputs):
        sizes = f"{query.shape[-1]} and {value.shape[-1]}"
        return f"heads of {sizes}: expected sizes from 1 to {LARGEST_HEAD}"
    if needs_plain_operations(*inputs, *edges):
        return (
            "the kernels are not plain operations: expected neither a torch.func transform nor a"
            " portable export"
        )
    if request.need_weights:
        return (
            "need_weights=True needs stored scores, which the kernels do not keep: expected False"
        )
    if request.form == "recurrent" and needs_grad(*inputs, *edges):
        return "form='recurrent' with gradients: expected 'attention' or 'chunk', or no gradients"
    return None


def triton_attention(request: AttentionRequest) -> Result:
    """The attention form: one chunk, which serves several orders and drops scores out."""
    return _fuse(_with_features(request), request.query.shape[2]), None


def triton_chunk(request: AttentionRequest) -> Result:
    """The chunk form. Orders share one chunk up to a length, and run one by one beyond it."""
    length = request.query.shape[2]
    ordered = request.directions[0].order is not None
    request = _with_features(request)
    if not ordered:
        return _fuse(request, request.chunk_size), None
    if length <= (request.chunk_size or LONGEST_CHUNK_OF_ORDERS):
        return _fuse(request, length), None
    return _by_states(fused_chunkwise, request)


def triton_recurrent(request: AttentionRequest) -> Result:
    """The recurrent form, for each order on its own."""
    return _by_states(fused_recurrent, _with_features(request))


def _with_features(request: AttentionRequest) -> AttentionRequest:
    if request.feature_map == "identity":
        return request
    query, key = (
        fused_features(x, None, request.mask, request.feature_map, request.value.dtype)
        for x in (request.query, request.key)
    )
    return request._replace(query=query, key=key)


def _fuse(request: AttentionRequest, chunk_size: int | None) -> torch.Tensor:
    """One launch for all orders, whose kernels know padding and, in one chunk, dropout."""
    order, *edges = (
        None if x[0] is None else x[0][None] if len(x) == 1 else torch.stack(x)
        for x in zip(*request.directions)
    )
    if order is not None:  # one that is not stacked has the caller's type and strides
        order = order.long().contiguous()
    device, dropout = request.query.device, request.dropout_p
    seed = torch.randint(2**62, (1,), device=device) if dropout > 0 else None
    output, _ = fused_forward(
        request.query, request.key, request.value, *edges, order, request.mask, seed, dropout,
        request.scale, request.normalize, request.eps, chunk_size, request.value.dtype,
    )  # fmt: skip
    return output


def _by_states(form, request: AttentionRequest) -> Result:
    inputs = hide_padding(request.mask, request.query, request.key, request.value)
    request = request._replace(query=inputs[0], key=inputs[1], value=inputs[2])
    output = divide(partial(each_order, form), request)
    return saturated(output, request.value.dtype), None


# ---- operators ----


@torch.library.custom_op("lion_hf::fused_features", mutates_args=())
def fused_features(
    x: torch.Tensor,
    grad: torch.Tensor | None,
    mask: torch.Tensor | None,
    name: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A feature map, computed in float32, or the gradient of its argument.

    Args:
        x: (B, H, L, D), of any strides, float32, bfloat16 or float16.
        grad: None for the features; for the gradient of x, that of the features.
        mask: (B, L), False where a token is padding, whose features and gradients are 0.
        name: "elu_plus_one", "normalized_silu" or "sqrt_softmax".
        dtype: type of the result.

    Returns:
        (B, H, L, D).
    """
    result = torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        launch_features(x, grad, mask, name, result)
    return result


@fused_features.register_fake
def _(x, grad, mask, name, dtype):
    return torch.empty_like(x, dtype=dtype)


def _setup_features(ctx, inputs, output) -> None:
    x, _, mask, ctx.name, _ = inputs
    ctx.save_for_backward(x, mask)


def _features_backward(ctx, grad: torch.Tensor):
    x, mask = ctx.saved_tensors
    if torch.is_grad_enabled():  # it is itself to be differentiated
        features = partial(_features_again, mask=mask, name=ctx.name)
        return gradients_again(features, (x,), grad)[0], None, None, None, None
    return fused_features(x, grad, mask, ctx.name, x.dtype), None, None, None, None


def _features_again(x: torch.Tensor, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """What `fused_features` computes, by operations that autograd knows."""
    (x,) = hide_padding(mask, x.to(compute_type(x)))
    return hide_padding(mask, FEATURE_MAPS[name](x))[0]


fused_features.register_autograd(_features_backward, setup_context=_setup_features)


@torch.library.custom_op("lion_hf::fused", mutates_args=())
def fused_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor | None,
    right_to_left: torch.Tensor | None,
    order: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout: float,
    scale: float,
    normalize: bool,
    eps: float,
    chunk_size: int | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention form (one chunk) and the chunk form.

    Args:
        query: (B, H, L, D), of any strides, rounded to the type of `value` for the matrix products.
        key: (B, H, L, D).
        value: (B, H, L, Dv), float32, bfloat16 or float16.
        left_to_right: log-decays in reading order, (K, B or 1, H or 1, L or 1), float32, or None
            for no decay.
        right_to_left: log-decays, likewise.
        order: (K, L) reading orders, for rows of one chunk; None if K is 1 and tokens are read as
            they stand.
        mask: (B, L), False where a token is padding, whose gates are 1.
        seed: one integer, which decides which masked scores are dropped, for rows of one chunk;
            None if none is.
        dropout: probability of dropping one.
        scale: factor of the scores.
        normalize: whether to divide by the sum of the masked scores.
        eps: added to that sum.
        chunk_size: tokens per chunk, chosen if None.
        dtype: type of the result.

    Returns:
        (B, H, L, Dv), and the divisor, (B, H, L) in float32, which is empty without `normalize`.
    """
    output = torch.empty_like(value, dtype=dtype)
    divisor = query.new_empty(query.shape[:3] if normalize else 0, dtype=torch.float32)
    if value.numel() == 0:
        return output, divisor
    shared = left_to_right, right_to_left, order, mask, seed, dropout, scale, normalize, chunk_size
    with torch.cuda.device_of(value):
        call = FusedCall(FusedInputs(query, value, *shared))
        states = call.write_states(key, value)
        call.launch(
            "forward", query, key, value, output, divisor, *call.or_none(states),
            call.sums, *call.or_none(call.mask), *query.stride(), *key.stride(), *value.stride(),
            *output.stride(), states=states, eps=eps,
        )  # fmt: skip
    return output, divisor


@fused_forward.register_fake
def _(query, key, value, left_to_right, right_to_left, order, mask, seed, dropout, scale, normalize,
      eps, chunk_size, dtype):  # fmt: skip
    shape = query.shape[:3] if normalize else 0
    return torch.empty_like(value, dtype=dtype), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("lion_hf::fused_backward", mutates_args=())
def fused_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor | None,
    right_to_left: torch.Tensor | None,
    order: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    output: torch.Tensor | None,
    divisor: torch.Tensor,
    dropout: float,
    scale: float,
    normalize: bool,
    chunk_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `fused_forward` with respect to its first five tensors.

    Those of absent decays are empty.
    """
    decays = left_to_right, right_to_left
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if value.numel() == 0:
        ltr, rtl = (_like_or_empty(x, query).zero_() for x in decays)
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_(), ltr, rtl
    shared = *decays, order, mask, seed, dropout, scale, normalize, chunk_size
    with torch.cuda.device_of(value):
        call = FusedCall(FusedInputs(query, value, *shared))
        places = None
        if order is not None:  # its inverse, for less than a sort
            steps = torch.arange(call.length, device=order.device).expand_as(order)
            places = torch.empty_like(order).scatter_(1, order, steps)
        delta = torch.empty_like(divisor)
        shape = *query.shape[:2], call.orders, 2, call.length
        grad_sums = query.new_empty(shape, dtype=torch.float32)
        kinds = {"KINDS": triton.next_power_of_2(max(call.orders, 1))}
        inputs = [grad, query, key, value]
        strides = [stride for x in inputs for stride in x.stride()]
        states = call.write_states(key, value)
        result = output if normalize and output is not None else grad
        call.launch(
            "grad_query", *inputs, result, divisor, delta, grads[0], grad_sums,
            *call.or_none(states), call.sums, *call.or_none(places, call.mask),
            *strides, *result.stride(), *grads[0].stride(), states=states, **kinds,
        )  # fmt: skip
        grad_states = call.write_states(query, grad, divisor, delta, backward=True)
        call.launch(
            "grad_key_value", *inputs, divisor, delta, *grads[1:], grad_sums,
            *call.or_none(grad_states), call.sums, call.totals, *call.or_none(places, call.mask),
            *strides, *grads[1].stride(), *grads[2].stride(), states=grad_states, **kinds,
        )  # fmt: skip
        edges = call.grad_edges(grad_sums, states, grad_states)
    if left_to_right is None:
        return *grads, query.new_empty(0), query.new_empty(0)
    ltr, rtl = (
        _like_or_empty(like, query).copy_(x.sum_to_size(left_to_right.shape))
        for x, like in zip(edges, decays)
    )
    return *grads, ltr, rtl


def _like_or_empty(x: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    return query.new_empty(0) if x is None else torch.empty_like(x)


@fused_backward.register_fake
def _(grad, query, key, value, left_to_right, right_to_left, *others):
    decays = (_like_or_empty(x, query) for x in (left_to_right, right_to_left))
    return *(torch.empty_like(x) for x in (query, key, value)), *decays


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.dropout, ctx.scale, ctx.normalize, ctx.eps, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, output[0] if ctx.normalize else None, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: torch.Tensor, _):
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():  # it is itself to be differentiated
        return *_backward_again(ctx, grad), *(None,) * 9
    options = ctx.dropout, ctx.scale, ctx.normalize, ctx.chunk_size
    *grads, left_to_right, right_to_left = fused_backward(grad, *tensors, *options)
    if tensors[3] is None:
        left_to_right = right_to_left = None
    return *grads, left_to_right, right_to_left, *(None,) * 9


def _backward_again(ctx, grad: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated, by the torch chunk form in float32."""
    *tensors, order, mask, seed, _, _ = ctx.saved_tensors
    if seed is not None:
        raise NotImplementedError(
            f"second derivatives with dropout_p={ctx.dropout} on the fused kernels: expected"
            " dropout_p=0 (attention_probs_dropout_prob in the config), or backend='torch'"
        )

    def function(query, key, value, left_to_right=None, right_to_left=None) -> torch.Tensor:
        query, key, value = hide_padding(mask, *(x.float() for x in (query, key, value)))
        if ctx.normalize:
            value = F.pad(value, (0, 1), value=1.0)
        edges = left_to_right, right_to_left
        inputs = ChunkInputs(query, key, value, *edges, order, ctx.scale, ctx.chunk_size)
        total = chunks_again(inputs)
        return total[..., :-1] / (total[..., -1:] + ctx.eps) if ctx.normalize else total

    return gradients_again(function, tensors, grad.float())


fused_forward.register_autograd(_backward, setup_context=_setup_context)


def fused_chunkwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor | None,
    right_to_left: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
) -> torch.Tensor:
    """The chunk form of one order; arguments and result as in `lion_chunkwise.chunkwise`."""
    decays = [None if x is None else x[None] for x in (left_to_right, right_to_left)]
    outputs = [
        fused_forward(
            query, key, values, *decays, None, None, None, 0.0, scale, False, 0.0, chunk_size,
            torch.float32,
        )[0]
        for values in value.split(LARGEST_HEAD, -1)  # the divisor's column may be one too many
    ]  # fmt: skip
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


@torch.library.custom_op("lion_hf::fused_recurrent", mutates_args=())
def fused_recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor | None,
    right_to_left: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
) -> torch.Tensor:
    """The recurrent form, without gradients; arguments and result as in `lion_naive.recurrent`."""
    output = torch.empty_like(value, dtype=torch.float32)
    if output.numel() > 0:
        launch_recurrent(query, key, value, left_to_right, right_to_left, scale, output)
    return output


@fused_recurrent.register_fake
def _(query, key, value, left_to_right, right_to_left, scale, chunk_size):
    return torch.empty_like(value, dtype=torch.float32)
