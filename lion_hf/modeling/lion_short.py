"""Short rows on a CPU: rows of one chunk, with feature map, padding and divisor in one step.

Both passes are written out, which spares most of what autograd would compute and allocate. With
features q and k, the mask M, P_ij = M_ij q_i . k_j, and the output's gradient g,

    y_i = sum_j P_ij v_j / d_i     d_i = sum_j P_ij + eps     (arXiv 2502.16249, section 3)
    h_i = g_i / d_i                G_ij = h_i . (v_j - y_i)
    dv_j = sum_i P_ij h_i          dq_i = sum_j M_ij G_ij k_j          dk_j = sum_i M_ij G_ij q_i

and P_ij G_ij gives the gradients of the decays, as in lion_chunkwise.py. Without normalisation d is
1, and y is left out of G.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .lion_choice import default_chunk_size
from .lion_chunk_parts import (
    LOG2_E,
    Block,
    ChunkInputs,
    Decays,
    Scratch,
    edge_gradients,
    row_blocks,
)
from .lion_chunkwise import backward_inside, chunks_again
from .lion_naive import EXPONENT_LIMIT, EXPONENTIAL_SCALE, map_features
from .lion_numerics import (
    compute_type,
    full_precision,
    gradients_again,
    needs_grad,
    plainly_on_cpu,
)
from .lion_request import AttentionRequest, divide_by_last, edges_of, with_divisor


class Mixing(NamedTuple):
    """What is done beside the products; `eps` is None where nothing is divided."""

    feature_map: str
    scale: float
    eps: float | None


def is_short(request: AttentionRequest) -> bool:
    """Whether `short_rows` serves a request in the chunk form.

    It does not without gates, for weights that are asked for, and where operations are traced or
    transformed.
    """
    edges = edges_of(request.directions)
    tensors = request.query, request.key, request.value, *edges
    if not edges or request.need_weights:
        return False
    others = [request.mask, *(order for order, *_ in request.directions)]
    # before lengths are compared, which a trace would record
    if not plainly_on_cpu(*tensors, *(x for x in others if x is not None)):
        return False
    length = request.query.shape[2]
    longest = request.chunk_size or default_chunk_size(length, "cpu")[0]
    if length > longest:
        return False
    return all(x.numel() > 0 for x in tensors)


def short_rows(request: AttentionRequest) -> torch.Tensor:
    """The operation for a request that `is_short`, (B, H, L, Dv), in float32 or float64."""
    orders, left_to_right, right_to_left = zip(*request.directions)
    order = None if orders[0] is None else torch.stack(orders)
    edges = torch.stack(left_to_right), torch.stack(right_to_left)
    tensors = request.query, request.key, request.value, *edges
    eps = request.eps if request.normalize else None
    mixing = Mixing(request.feature_map, request.scale, eps)
    padding = None if request.mask is None else ~request.mask[:, None, :, None]
    if needs_grad(*tensors):
        return _ShortRows.apply(mixing, order, padding, *tensors)
    inputs = _inputs(mixing, order, tensors)
    return _forward(mixing, inputs, _operands(mixing, inputs, padding, False), padding)[0]


def _inputs(
    mixing: Mixing, order: torch.Tensor | None, tensors: Sequence[torch.Tensor]
) -> ChunkInputs:
    query, key, value, left_to_right, right_to_left = tensors
    edges = left_to_right, right_to_left
    return ChunkInputs(query, key, value, *edges, order, mixing.scale, None)


# Features of queries or keys, and what their gradient needs beside them, or None.
Features = tuple[torch.Tensor, torch.Tensor | None]


class Operands(NamedTuple):
    """What the products are made of, in the type of the computation, contiguous if B > 1."""

    query: torch.Tensor  # features, (B, H, L, D or 2 D), 0 at padding
    key: torch.Tensor  # likewise
    value: torch.Tensor  # (B, H, L, Dv), where it is divided with a last column of ones
    query_slopes: torch.Tensor | None  # (B, H, L, D), what `_through` needs beside the features
    key_slopes: torch.Tensor | None


class _ShortRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        mixing: Mixing,
        order: torch.Tensor | None,
        padding: torch.Tensor | None,
        *tensors: torch.Tensor,
    ):
        inputs = _inputs(mixing, order, tensors)
        operands = _operands(mixing, inputs, padding, True)
        output, divisor = _forward(mixing, inputs, operands, padding)
        ctx.mixing = mixing
        kept = None if divisor is None else output.clone()  # the caller may write to the output
        ctx.save_for_backward(order, padding, kept, divisor, *tensors, *operands)
        return output

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        mixing, (order, padding, output, divisor, *saved) = ctx.mixing, ctx.saved_tensors
        inputs = _inputs(mixing, order, saved[:5])
        if torch.is_grad_enabled() or not plainly_on_cpu(grad):  # differentiated again, or batched

            def function(*tensors: torch.Tensor) -> torch.Tensor:
                return _again(mixing, _inputs(mixing, order, tensors), padding)

            return None, None, None, *gradients_again(function, inputs[:5], grad)
        operands = Operands(*saved[5:])
        found = _gradients(mixing, inputs, operands, padding, grad, output, divisor)
        return None, None, None, *found


def _again(mixing: Mixing, inputs: ChunkInputs, padding: torch.Tensor | None) -> torch.Tensor:
    """The output by operations that autograd knows."""
    query, key, value = (_hide(x, padding) for x in inputs[:3])
    query, key = (_hide(map_features(mixing.feature_map, x, value), padding) for x in (query, key))
    inputs = inputs._replace(value=value)
    if mixing.eps is None:
        return chunks_again(inputs._replace(query=query, key=key))
    total = chunks_again(inputs._replace(query=query, key=key, value=with_divisor(value)))
    return divide_by_last(total, mixing.eps)


def _hide(x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """The tensor (B, H, L, any) with zeros at padding, (B, 1, L, 1)."""
    return x if padding is None else x.masked_fill(padding, 0)


def _operands(
    mixing: Mixing, inputs: ChunkInputs, padding: torch.Tensor | None, record: bool
) -> Operands:
    value, dtype = inputs.value, compute_type(inputs.value)
    (query, query_slopes), (key, key_slopes) = (
        _features(mixing.feature_map, x, dtype, padding, record) for x in inputs[:2]
    )
    value = _hide(value, padding)
    if mixing.eps is None:
        value = _batched(value, dtype)
    else:
        value = F.pad(value.to(dtype), (0, 1), value=1.0).contiguous()
    return Operands(query, key, value, query_slopes, key_slopes)


def _batched(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor laid out so that the heads of all rows are one batch of matrices."""
    x = x.to(dtype)
    return x if x.shape[0] == 1 else x.contiguous()


def _features(
    feature_map: str,
    x: torch.Tensor,
    dtype: torch.dtype,
    padding: torch.Tensor | None,
    record: bool,
) -> Features:
    """Features of queries or keys, and with `record` what `_through` needs beside them."""
    if feature_map == "identity":
        return _batched(_hide(x, padding), dtype), None
    x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if padding is None:
        return MAPS[feature_map](x, record)
    features, slopes = MAPS[feature_map](x.masked_fill_(padding, 0), record)
    return features.masked_fill_(padding, 0), slopes


def _elu_plus_one(x: torch.Tensor, record: bool) -> Features:
    above = F.relu(x)
    return x.clamp_(max=0).exp_().add_(above), None


def _normalized_silu(x: torch.Tensor, record: bool) -> Features:
    """The features f = u / |u|, and the slopes du / dx / |u|."""
    slopes = None
    if record:  # with s = silu(x) = x sigmoid(x): ds / dx = sigmoid(x) + s (1 - sigmoid(x))
        sigmoid = x.sigmoid()
        x.mul_(sigmoid)
        complement = 1 - sigmoid  # s - s sigmoid(x) would lose digits where s is large
        slopes = sigmoid.addcmul_(x, complement)
    else:
        F.silu(x, inplace=True)
    norms = torch.linalg.vector_norm(x.add_(0.5), dim=-1, keepdim=True)  # each entry is above 0.2
    return x.div_(norms), None if slopes is None else slopes.div_(norms)


def _sqrt_softmax(x: torch.Tensor, record: bool) -> Features:
    return x.softmax(dim=-1).sqrt_(), None


def _exponential(x: torch.Tensor, record: bool) -> Features:
    """Both halves of the features, and where an exponent reached its limit a slope of zero."""
    slopes = None
    if record and (beyond := x.abs() > EXPONENT_LIMIT).any():
        slopes = (~beyond).to(x.dtype)
    both = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    up, down = both.chunk(2, dim=-1)
    torch.mul(x.clamp_(-EXPONENT_LIMIT, EXPONENT_LIMIT), LOG2_E, out=up)
    torch.neg(up, out=down)
    return both.add_(math.log2(EXPONENTIAL_SCALE)).exp2_(), slopes


# The feature maps of lion_naive.py, which write over their argument.
MAPS: dict[str, Callable[[torch.Tensor, bool], Features]] = {
    "elu_plus_one": _elu_plus_one,
    "normalized_silu": _normalized_silu,
    "sqrt_softmax": _sqrt_softmax,
    "exponential": _exponential,
}


def _through(
    feature_map: str, grad: torch.Tensor, features: torch.Tensor, slopes: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of queries or keys from that of their features, which is written over."""
    if feature_map == "elu_plus_one":
        return grad.mul_(features.clamp(max=1))
    if feature_map in ("normalized_silu", "sqrt_softmax"):  # df = (g - (g . f) f) du / |u|
        along = torch.linalg.vecdot(grad, features).unsqueeze(-1)
        grad.addcmul_(features, along, value=-1)
    if feature_map == "sqrt_softmax":  # du = u dx / 2
        return grad.mul_(features).mul_(0.5)
    if feature_map == "exponential":
        up, down = grad.mul_(features).chunk(2, dim=-1)
        grad = up.sub_(down)
    return grad if slopes is None else grad.mul_(slopes)


def _like_projections(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor of the shape (B, H, L, D), in memory as projections are: (B, L, H, D)."""
    _, heads, length, size = x.shape
    strides = length * heads * size, size, heads * size, 1
    return x.new_empty_strided(x.shape, strides, dtype=dtype)  # a view could not be written to


def _forward(
    mixing: Mixing, inputs: ChunkInputs, operands: Operands, padding: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output, and what it was divided by, (B, H, L, 1); 1 at padding."""
    query, key, value = operands[:3]
    length, dtype, divisor = query.shape[2], value.dtype, None
    output = _like_projections(inputs.value, dtype)
    if mixing.eps is not None:
        divisor = query.new_empty(*query.shape[:3], 1)
    with full_precision(value):
        decays, scratch = Decays(inputs, length, dtype), Scratch(query, dtype)
        for rows in row_blocks(query, length):
            mask, _ = decays.masks(rows, 0, length, scratch)
            weights = scratch.product("scores", query[rows], key[rows].mT).mul_(mask)
            total = scratch.product("output", weights, value[rows])
            if divisor is None or mixing.eps is None:
                output[rows] = total
            else:
                divisor[rows] = total[..., -1:].add_(mixing.eps)
                if padding is not None:
                    divisor[rows].masked_fill_(padding[rows], 1)
                torch.div(total[..., :-1], divisor[rows], out=output[rows])
    return output, divisor


def _gradients(
    mixing: Mixing,
    inputs: ChunkInputs,
    operands: Operands,
    padding: torch.Tensor | None,
    grad: torch.Tensor,
    output: torch.Tensor | None,
    divisor: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, value and of the log-decays in both directions.

    `output` and `divisor` are there if something is divided.
    """
    value = operands.value
    length, dtype = value.shape[2], value.dtype
    grads = [_like_projections(x, x.dtype) for x in inputs[:3]]
    with full_precision(value):
        decays, scratch = Decays(inputs, length, dtype), Scratch(value, dtype)
        sums = decays.empty_gradients(inputs)
        for rows in row_blocks(value, length):
            block = Block(inputs, decays, scratch, rows)
            q, k, v = (x[rows] for x in operands[:3])
            if divisor is None or output is None:
                g = scratch("grad", *v.shape).copy_(grad[rows])
            else:
                g = _divided(scratch, grad[rows], output[rows], divisor[rows])
            found = backward_inside(block, 0, [g, q, k, v], sums[:, :, rows, :, 0])
            for n, (x, features, slopes) in enumerate(
                ((found[0], q, operands.query_slopes), (found[1], k, operands.key_slopes))
            ):
                part = None if slopes is None else slopes[rows]
                x = _through(mixing.feature_map, x, features, part)
                grads[n][rows] = x if padding is None else x.masked_fill_(padding[rows], 0)
            grads[2][rows] = found[2]
    return *grads, *edge_gradients(sums, inputs)


def _divided(
    scratch: Scratch, grad: torch.Tensor, output: torch.Tensor, divisor: torch.Tensor
) -> torch.Tensor:
    """h, with one column more for the ones beside the values: -h_i . y_i."""
    g = scratch("grad", *grad.shape[:3], grad.shape[3] + 1)
    divided = torch.div(grad, divisor, out=g[..., :-1])
    products = torch.mul(divided, output, out=scratch("output", *grad.shape))
    torch.sum(products, -1, out=g[..., -1]).neg_()
    return g
