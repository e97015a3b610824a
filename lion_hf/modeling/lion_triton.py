"""The fused GPU kernels: how they are cut, their launches, and their registration with torch.

One kernel sums up the log-decays. The attention form is one chunk as long as the row, and one
launch computes all of it. The chunk form adds states, which one kernel writes for every chunk and
another passes along; without decay there are states alone, or for short rows tiles alone. The
backward pass computes all of it again from the inputs and, where it divides, the output and the
divisor. A feature map is a kernel before all that. The kernels are in lion_triton_kernels.py
(matrix products) and lion_triton_scans.py. There are no atomic additions, so equal inputs give
equal gradients. Attention maps are left to the torch attention form, gradients through the
recurrent form to the torch recurrent form, and float64 to torch altogether.
"""

import os
from functools import partial
from typing import NamedTuple

import torch

from .lion_choice import default_chunk_size
from .lion_numerics import needs_grad, saturated
from .lion_portable import needs_plain_operations
from .lion_request import (
    AttentionRequest,
    Result,
    divide,
    each_order,
    edges_of,
    hide_padding,
)
from .lion_triton_kernels import (
    forward_kernel,
    grad_key_value_kernel,
    grad_query_kernel,
    write_states_kernel,
)
from .lion_triton_parts import triton
from .lion_triton_scans import (
    features_kernel,
    grad_edges_kernel,
    pass_states_kernel,
    recurrent_kernel,
    sums_kernel,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
# Without decay chunks only share out the sum over the row.
PLAIN_CHUNK_SIZE = 1024
# Two orders are two chunk forms on permuted copies, so they share one chunk's scores for longer
# (not measured).
LONGEST_CHUNK_OF_ORDERS = 2048
# Numbers of the recurrent form's state that one program holds in registers.
STATE_SIZE = 2048
# Numbers that a program maps to features.
FEATURES_SIZE = 2048


class Blocks(NamedTuple):
    """How a kernel is cut."""

    rows: int  # of a program
    columns: int  # of a step
    slices: int  # of a head, by which a program reads states
    warps: int
    stages: int


# By kernel, then bytes per element and largest head size. From the compiler's reports for sm_90,
# not
# measured: tiles of 64 rows use the warp-group products of half types; the gradients keep more
# tiles at once, so theirs are narrower; float32 takes three products for one and twice the space.
# Of half types next to no registers spill, of float32 some (see tests/test_triton.py).
GRADIENT_BLOCKS = {
    (2, 64): Blocks(64, 32, 64, 4, 2),
    (2, 128): Blocks(64, 32, 32, 8, 2),
    (2, 256): Blocks(32, 32, 32, 8, 2),
    (4, 64): Blocks(32, 32, 32, 4, 2),
    (4, 128): Blocks(32, 32, 32, 8, 1),
    (4, 256): Blocks(16, 16, 16, 8, 1),
}
BLOCKS = {
    "forward": {
        (2, 64): Blocks(64, 64, 64, 4, 2),
        (2, 128): Blocks(64, 64, 32, 8, 2),
        (2, 256): Blocks(64, 32, 32, 8, 2),
        (4, 64): Blocks(64, 32, 32, 4, 1),
        (4, 128): Blocks(32, 32, 32, 8, 1),
        (4, 256): Blocks(16, 16, 16, 8, 1),
    },
    "grad_query": GRADIENT_BLOCKS | {(4, 64): Blocks(64, 32, 32, 8, 2)},
    "grad_key_value": GRADIENT_BLOCKS,
    # Rows are the tokens of a step; slices and columns are the part of a state (that of query or
    # key, and that of value) that a program sums.
    "write_states": {(2, 256): Blocks(64, 64, 64, 4, 2), (4, 256): Blocks(32, 32, 32, 4, 2)},
}


def _power(n: int) -> int:
    """The power of two that holds n, and at least the 16 that a matrix product takes."""
    return max(16, triton.next_power_of_2(n))


def blocks_of(kernel: str, element: int, head: int) -> Blocks:
    """The first row of the table that holds the head, for so many bytes per element."""
    rows = BLOCKS[kernel].items()
    return next(row for (size, largest), row in rows if size == element and head <= largest)


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


# ---- launches ----


class _Inputs(NamedTuple):
    """What the two passes share of the arguments of `fused_forward`."""

    query: torch.Tensor
    value: torch.Tensor
    left_to_right: torch.Tensor | None
    right_to_left: torch.Tensor | None
    order: torch.Tensor | None
    mask: torch.Tensor | None
    seed: torch.Tensor | None
    dropout: float
    scale: float
    normalize: bool
    chunk_size: int | None


class _Call:
    """Sizes, prefix sums and launches that the two passes share."""

    def __init__(self, inputs: _Inputs):
        query, value, mask = inputs.query, inputs.value, inputs.mask
        self.seed, self.dropout = inputs.seed, inputs.dropout
        self.batch, self.heads, self.length, self.head = query.shape
        self.value_head, self.element = value.shape[-1], value.element_size()
        self.rows = self.batch * self.heads
        self.normalize, self.order = inputs.normalize, inputs.order
        self.mask = None if mask is None else mask.contiguous()
        self.orders = 0 if inputs.left_to_right is None else inputs.left_to_right.shape[0]
        self.sides = 2 if self.orders else 1  # without decay both directions have one state
        self.scale = inputs.scale / max(self.orders, 1)
        default = default_chunk_size(self.length, "cuda")[0]
        self.chunk = min(inputs.chunk_size or default, self.length)
        self.states = self.chunk < self.length
        self.tiles = self.orders > 0 or not self.states
        if not self.tiles:
            self.chunk = PLAIN_CHUNK_SIZE
        self.count = triton.cdiv(self.length, self.chunk)
        self.elements = self.head * self.value_head + self.head * self.normalize
        # Kernels do not read what they are given in the place of a tensor that there is not.
        self.sums = self.totals = self.none = query
        self.sums_strides = (0, 0)
        if self.orders:
            self._add_sums(inputs.left_to_right, inputs.right_to_left)

    def _add_sums(self, left_to_right, right_to_left) -> None:
        """F and B of the tokens, and the decays over whole chunks.

        They are made for as many rows and heads as the edges differ in.
        """
        batch, heads = left_to_right.shape[1:3]
        shape = batch, heads, self.orders, 2, 2
        self.sums = left_to_right.new_empty(*shape, self.length)
        self.totals = left_to_right.new_empty(*shape, self.count)
        by_batch, by_head = self.sums.stride()[:2]
        self.sums_strides = 0 if batch == 1 else by_batch, 0 if heads == 1 else by_head
        edges = [x.expand(*x.shape[:3], self.length) for x in (left_to_right, right_to_left)]
        sums_kernel[(batch * heads * self.orders * self.count,)](
            *edges, *self.or_none(self.order), self.sums, self.totals,
            *edges[0].stride(), *edges[1].stride(),
            heads=heads, length=self.length, chunk=self.chunk,
            ORDERS=self.orders, ORDERED=self.order is not None, BLOCK=self.scan_block(),
        )  # fmt: skip

    def scan_block(self) -> int:
        return min(1024, _power(self.chunk))

    def launch(self, kernel, name: str, *args, states=None, **options) -> None:
        """One of the three kernels that compute a chunk block by block."""
        blocks = blocks_of(name, self.element, max(self.head, self.value_head))
        slices = min(blocks.slices, _power(max(self.head, self.value_head)))
        strides = (0, 0, 0) if states is None else self.states_strides(states)
        kernel[(self.rows * self.count * triton.cdiv(self.chunk, blocks.rows),)](
            *args, *self.sums_strides, *strides,
            heads=self.heads, length=self.length, chunk=self.chunk, scale=self.scale,
            D=self.head, DV=self.value_head, BLOCK_D=_power(self.head),
            BLOCK_V=_power(self.value_head), BLOCK_M=blocks.rows, BLOCK_N=blocks.columns,
            BLOCK_S=slices, ORDERS=self.orders, RASTER=self.orders == 1 and self.order is None,
            TILES=self.tiles, STATES=self.states, SIDES=self.sides, NORMALIZE=self.normalize,
            MASKED=self.mask is not None, DROPOUT=self.seed is not None, dropout=self.dropout,
            seed=self.none if self.seed is None else self.seed,
            num_warps=blocks.warps, num_stages=blocks.stages, **options,
        )  # fmt: skip

    def states_strides(self, states) -> tuple[int, int, int]:
        """Of heads, directions and chunks, which without decay share one state."""
        return *states.stride()[:2], states.stride(2) if states.shape[2] > 1 else 0

    def write_states(self, x, y, divisor=None, delta=None, backward=False) -> torch.Tensor | None:
        """The states in front of every chunk, or one for all chunks without decay.

        They are (B * H, directions, N, elements). x and y are key and value; or query and the
        output's gradient, with divisor and delta, for the gradients of the states.
        """
        if not self.states:
            return None
        blocks = blocks_of("write_states", self.element, max(self.head, self.value_head))
        tile_d = min(_power(self.head), blocks.slices)
        tile_v = min(_power(self.value_head), blocks.columns)
        tiles = triton.cdiv(self.head, tile_d) * triton.cdiv(self.value_head, tile_v)
        shape = self.rows, self.sides, self.count, self.elements
        states = x.new_empty(shape, dtype=torch.float32)
        write_states_kernel[(self.rows * self.count * tiles,)](
            x, y, states, self.sums, self.totals, *self.or_none(self.mask, divisor, delta),
            *x.stride(), *y.stride(), *self.sums_strides, *states.stride()[:3],
            scale=self.scale, heads=self.heads, length=self.length, chunk=self.chunk,
            D=self.head, DV=self.value_head, BLOCK_D=tile_d, BLOCK_V=tile_v, BLOCK=blocks.rows,
            DECAY=self.orders > 0, NORMALIZE=self.normalize, MASKED=self.mask is not None,
            BACKWARD=backward, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        if not self.orders:
            return states.sum(2, keepdim=True)
        block = min(256, _power(self.elements))
        pass_states_kernel[(self.rows * self.sides * triton.cdiv(self.elements, block),)](
            states, self.totals, *self.sums_strides, *states.stride()[:3],
            heads=self.heads, length=self.length, chunk=self.chunk, elements=self.elements,
            BLOCK=block, BACKWARD=backward,
        )  # fmt: skip
        return states

    def grad_edges(self, grad_sums, states, grad_states) -> list[torch.Tensor]:
        """Gradients of the edges in both directions, (K, B, H, L), from those of the sums.

        Those of the sums are (B, H, K, 2, L).
        """
        shape = self.orders, self.batch, self.heads, self.length
        edges = [grad_sums.new_empty(shape) for _ in range(2)]
        if self.orders:
            strides = (0, 0, 0) if states is None else self.states_strides(states)
            grad_edges_kernel[(self.rows * self.orders * self.count,)](
                grad_sums, *self.or_none(states, grad_states, self.order), *edges, *strides,
                batch=self.batch, heads=self.heads, length=self.length, chunk=self.chunk,
                elements=self.elements, ORDERS=self.orders, ORDERED=self.order is not None,
                STATES=self.states, BLOCK=self.scan_block(),
            )  # fmt: skip
        return edges

    def or_none(self, *tensors) -> list[torch.Tensor]:
        return [self.none if x is None else x for x in tensors]


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
        name: "elu_plus_one" or "normalized_silu".
        dtype: type of the result.

    Returns:
        (B, H, L, D).
    """
    result, (batch, heads, length, head) = torch.empty_like(x, dtype=dtype), x.shape
    if x.numel() == 0:
        return result
    width = triton.next_power_of_2(head)
    block = max(1, FEATURES_SIZE // width)
    other = x if grad is None else grad
    with torch.cuda.device_of(x):
        features_kernel[(batch * heads * triton.cdiv(length, block),)](
            x, other, result, x if mask is None else mask.contiguous(),
            *x.stride(), *other.stride(), *result.stride(), heads=heads, length=length,
            D=head, BLOCK_D=width, BLOCK=block, NAME=name, MASKED=mask is not None,
            BACKWARD=grad is not None,
        )  # fmt: skip
    return result


@fused_features.register_fake
def _(x, grad, mask, name, dtype):
    return torch.empty_like(x, dtype=dtype)


def _setup_features(ctx, inputs, output) -> None:
    x, _, mask, ctx.name, _ = inputs
    ctx.save_for_backward(x, mask)


def _features_backward(ctx, grad: torch.Tensor):
    x, mask = ctx.saved_tensors
    return fused_features(x, grad, mask, ctx.name, x.dtype), None, None, None, None


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
        call = _Call(_Inputs(query, value, *shared))
        states = call.write_states(key, value)
        call.launch(
            forward_kernel, "forward", query, key, value, output, divisor, *call.or_none(states),
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
        call = _Call(_Inputs(query, value, *shared))
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
            grad_query_kernel, "grad_query", *inputs, result, divisor, delta, grads[0], grad_sums,
            *call.or_none(states), call.sums, *call.or_none(places, call.mask),
            *strides, *result.stride(), *grads[0].stride(), states=states, **kinds,
        )  # fmt: skip
        grad_states = call.write_states(query, grad, divisor, delta, backward=True)
        call.launch(
            grad_key_value_kernel, "grad_key_value", *inputs, divisor, delta, *grads[1:], grad_sums,
            *call.or_none(grad_states), call.sums, call.totals, *call.or_none(places, call.mask),
            *strides, *grads[1].stride(), *grads[2].stride(), states=grad_states, **kinds,
        )  # fmt: skip
        edges = call.grad_edges(grad_sums, states, grad_states)
    if left_to_right is None:
        return *grads, query.new_empty(0), query.new_empty(0)
    ltr, rtl = (x.sum_to_size(left_to_right.shape) for x in edges)
    return *grads, ltr, rtl


def _like_or_empty(x: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    return query.new_empty(0) if x is None else torch.empty_like(x)


@fused_backward.register_fake
def _(grad, query, key, value, left_to_right, right_to_left, *others):
    decays = (_like_or_empty(x, query) for x in (left_to_right, right_to_left))
    return *(torch.empty_like(x) for x in (query, key, value)), *decays


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.dropout, ctx.scale, ctx.normalize, _, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, output[0] if ctx.normalize else None, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: torch.Tensor, _):
    tensors = ctx.saved_tensors
    options = ctx.dropout, ctx.scale, ctx.normalize, ctx.chunk_size
    *grads, left_to_right, right_to_left = fused_backward(grad, *tensors, *options)
    if tensors[3] is None:
        left_to_right = right_to_left = None
    return *grads, left_to_right, right_to_left, *(None,) * 9


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
    decays = (None if x is None else x[None] for x in (left_to_right, right_to_left))
    return fused_forward(
        query, key, value, *decays, None, None, None, 0.0, scale, False, 0.0, chunk_size,
        torch.float32,
    )[0]  # fmt: skip


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
    if output.numel() == 0:
        return output
    batch, heads, length, head = query.shape
    value_head = value.shape[-1]
    edges = [query, query]
    if left_to_right is not None and right_to_left is not None:
        edges = [x.expand(batch, heads, length) for x in (left_to_right, right_to_left)]
    columns = min(_power(value_head), max(16, STATE_SIZE // _power(head)))
    strides = [s for x in (query, key, value, output) for s in x.stride()]
    with torch.cuda.device_of(value):
        recurrent_kernel[(batch * heads * triton.cdiv(value_head, columns),)](
            query, key, value, output, *edges, *strides,
            *edges[0].stride()[:3], *edges[1].stride()[:3], scale=scale, heads=heads, length=length,
            D=head, DV=value_head, BLOCK_D=_power(head), BLOCK_V=columns,
            DECAY=left_to_right is not None,
        )  # fmt: skip
    return output


@fused_recurrent.register_fake
def _(query, key, value, left_to_right, right_to_left, scale, chunk_size):
    return torch.empty_like(value, dtype=torch.float32)
