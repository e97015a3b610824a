"""Fused GPU kernels for the three forms of the operation: launches, scans along a row, and registration with torch.

One kernel sums up the log-decays. The attention form is one chunk as long as the row, and one launch computes all of it; the
chunk form adds states, which one kernel writes for every chunk and another passes along; without decay there are states
alone, or for short rows tiles alone. The backward pass recomputes all of it from the inputs and, where it divides, the output
and the divisor. A feature map is a kernel before all that. The kernels made of matrix products, and the mathematics, are in
lion_triton_kernels.py. There are no atomic additions, so equal inputs give equal gradients. Attention maps are left to the
torch attention form, gradients through the recurrent form to the torch recurrent form, and float64 to torch altogether.
"""

from typing import NamedTuple

import torch

from .lion_chunkwise import default_chunk_size
from .lion_triton_kernels import (
    RUNTIME,
    features_kernel,
    forward_kernel,
    grad_key_value_kernel,
    grad_query_kernel,
    tl,
    triton,
    write_states_kernel,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
# Without decay chunks only share out the sum over the row.
PLAIN_CHUNK_SIZE = 1024
# Two orders are two chunk forms on permuted copies, so they share one chunk's scores for longer (not measured).
LONGEST_CHUNK_OF_ORDERS = 2048
# Numbers of the recurrent form's state that one program holds in registers.
STATE_SIZE = 2048
# Numbers that a program maps to features.
FEATURES_SIZE = 2048
LOG2_E = tl.constexpr(1.4426950408889634)


class Blocks(NamedTuple):
    """How a kernel is cut: a program's rows, the columns of a step, and the slice of a head by which it reads states."""

    rows: int
    columns: int
    slices: int
    warps: int
    stages: int


# By kernel, then bytes an element and largest head size. From the compiler's reports for sm_90, not measured: tiles of 64 rows
# use the warp-group products of half types; the gradients keep more tiles at once, so theirs are narrower; float32 takes three
# products for one and twice the space. Of half types next to no registers spill, of float32 some (see tests/test_triton.py).
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
    # rows are the tokens of a step, slices and columns the part of a state (query's or key's, and value's) that a program sums
    "write_states": {(2, 256): Blocks(64, 64, 64, 4, 2), (4, 256): Blocks(32, 32, 32, 4, 2)},
}


@triton.jit
def _store_sums(base, place, length, sums, inside):
    """A float64 number as two float32 numbers."""
    high = sums.to(tl.float32)
    tl.store(base + place, high, mask=inside)
    tl.store(base + length + place, (sums - high.to(tl.float64)).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def sums_kernel(
    forward, backward, order, sums, totals,
    forward_k, forward_b, forward_h, forward_l, backward_k, backward_b, backward_h, backward_l, heads, length, chunk,
    ORDERS: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """F, sums over the edges of a chunk before a token, and B, over those behind it, the one to the next chunk included.

    Reads edges, (K, B, H, L), in reading order. Writes sums, (B, H, K, 2, 2, L), at the tokens' places, and totals over chunks,
    (B, H, K, 2, 2, N): for F and for B a high and a low part.
    """
    count = tl.cdiv(length, chunk)
    program = tl.program_id(0)
    n = program % count
    row = (program // count).to(tl.int64)
    k, h, b = row % ORDERS, row // ORDERS % heads, row // ORDERS // heads
    forward += k * forward_k + b * forward_b + h * forward_h
    backward += k * backward_k + b * backward_b + h * backward_h
    sums += row * 4 * length
    begin = n * chunk
    size = tl.minimum(chunk, length - begin)
    left = tl.zeros((1,), tl.float64)
    right = tl.zeros((1,), tl.float64)
    for start in range(0, size, BLOCK):
        steps = start + tl.arange(0, BLOCK)
        step = begin + steps  # left to right, each token without its own edge
        edge = tl.load(forward + step.to(tl.int64) * forward_l, mask=(steps < size) & (step < length - 1), other=0.0)
        edge = edge.to(tl.float64) * LOG2_E
        place = tl.load(order + k * length + step, mask=steps < size, other=0) if ORDERED else step
        _store_sums(sums, place, length, left + tl.cumsum(edge, 0) - edge, steps < size)
        left += tl.sum(edge, 0)
        step = begin + size - 1 - steps  # right to left, each token with its own edge
        inside = (steps < size) & (step < length - 1)  # the row's last entry belongs to no edge
        edge = tl.load(backward + step.to(tl.int64) * backward_l, mask=inside, other=0.0).to(tl.float64) * LOG2_E
        place = tl.load(order + k * length + step, mask=steps < size, other=0) if ORDERED else step
        _store_sums(sums + 2 * length, place, length, right + tl.cumsum(edge, 0), steps < size)
        right += tl.sum(edge, 0)
    totals += row * 4 * count + n + tl.arange(0, 1)
    _store_sums(totals, 0, count, left, None)
    _store_sums(totals + 2 * count, 0, count, right, None)


@triton.jit(do_not_specialize=RUNTIME)
def pass_states_kernel(
    states, totals, sums_b, sums_h, states_h, states_side, states_n, heads, length, chunk, elements,
    BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Passes the states along the chunks, in place: a chunk gets what those before it (or behind it) leave.

    Left states go from the first chunk to the last and right ones back; backward it is the other way round.
    """
    count = tl.cdiv(length, chunk)
    blocks = tl.cdiv(elements, BLOCK)
    program = tl.program_id(0)
    side = program // blocks % 2
    row = (program // (2 * blocks)).to(tl.int64)
    places = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    totals += (row // heads * sums_b + row % heads * sums_h) // length * count + 2 * side * count
    rising = (side == 1) if BACKWARD else (side == 0)
    n = tl.where(rising, 0, count - 1)
    step = tl.where(rising, 1, -1)
    states += row * states_h + side * states_side + n.to(tl.int64) * states_n + places
    hop = step.to(tl.int64) * states_n
    state = tl.zeros((BLOCK,), tl.float32)
    local = tl.load(states, mask=inside, other=0.0)
    for i in range(count):
        # The next chunk is on its way while this one is written.
        following = tl.load(states + hop, mask=inside & (i + 1 < count), other=0.0)
        decay = tl.exp2(tl.load(totals + n) + tl.load(totals + count + n))
        tl.store(states, state, mask=inside)
        state = state * decay + local
        local = following
        states += hop
        n += step


@triton.jit(do_not_specialize=RUNTIME)
def grad_edges_kernel(
    grad_sums, states, grad_states, order, grad_forward, grad_backward,
    states_h, states_side, states_n, batch, heads, length, chunk, elements,
    ORDERS: tl.constexpr, ORDERED: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the edges, (K, B, H, L) in reading order, from those of the chunks' sums.

    An edge belongs to F of all later tokens and to B of itself and all earlier ones, of its chunk, and to the chunk's whole
    decay, which S and T are passed on with: <S behind the chunk, U> and <T before the chunk, W>.
    """
    count = tl.cdiv(length, chunk)
    program = tl.program_id(0)
    n = program % count
    row = (program // count).to(tl.int64)
    k, head = row % ORDERS, row // ORDERS
    begin = n * chunk
    size = tl.minimum(chunk, length - begin)
    grad_sums += row * 2 * length
    grad_forward += (k * batch * heads + head) * length
    grad_backward += (k * batch * heads + head) * length
    left = tl.zeros((1,), tl.float64)
    right = tl.zeros((1,), tl.float64)
    steps = tl.arange(0, BLOCK)
    if STATES:
        states += head * states_h + n.to(tl.int64) * states_n
        grad_states += head * states_h + n.to(tl.int64) * states_n
        for start in range(0, elements, BLOCK):
            inside = (start + steps < elements) & (n + 1 < count)
            state = tl.load(states + states_n + start + steps, mask=inside, other=0.0)
            left += tl.sum(state * tl.load(grad_states + start + steps, mask=inside, other=0.0), 0)
            inside = (start + steps < elements) & (n > 0)
            state = tl.load(states + states_side - states_n + start + steps, mask=inside, other=0.0)
            right += tl.sum(state * tl.load(grad_states + states_side + start + steps, mask=inside, other=0.0), 0)
    for start in range(0, size, BLOCK):
        inside = start + steps < size
        step = begin + size - 1 - start - steps
        place = tl.load(order + k * length + step, mask=inside, other=0) if ORDERED else step
        change = tl.load(grad_sums + place, mask=inside, other=0.0).to(tl.float64)
        total = tl.where(step < length - 1, left + tl.cumsum(change, 0) - change, 0.0)
        tl.store(grad_forward + step, total.to(tl.float32), mask=inside)
        left += tl.sum(change, 0)
        step = begin + start + steps
        place = tl.load(order + k * length + step, mask=inside, other=0) if ORDERED else step
        change = tl.load(grad_sums + length + place, mask=inside, other=0.0).to(tl.float64)
        total = tl.where(step < length - 1, right + tl.cumsum(change, 0), 0.0)  # the last entry belongs to no edge
        tl.store(grad_backward + step, total.to(tl.float32), mask=inside)
        right += tl.sum(change, 0)


@triton.jit(do_not_specialize=RUNTIME)
def recurrent_kernel(
    query, key, value, output, forward, backward,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, o_b, o_h, o_l, o_d,
    forward_b, forward_h, forward_l, backward_b, backward_h, backward_l, scale, heads, length,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """The recurrent form for some columns of the values: one sweep from right to left and one back, a state in registers."""
    tiles = tl.cdiv(DV, BLOCK_V)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    dims, columns = tl.arange(0, BLOCK_D), tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    inside, inside_v = dims < D, columns < DV
    last = (length - 1).to(tl.int64)
    query += b * q_b + h * q_h + last * q_l + dims * q_d
    key += b * k_b + h * k_h + last * k_l + dims * k_d
    value += b * v_b + h * v_h + last * v_l + columns * v_d
    output += b * o_b + h * o_h + last * o_l + columns * o_d
    forward += b * forward_b + h * forward_h - forward_l
    backward += b * backward_b + h * backward_h + last * backward_l
    for sweep in tl.static_range(2):
        state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
        hop = 2 * sweep - 1
        for step in range(length):
            q = tl.load(query, mask=inside, other=0.0).to(tl.float32) * scale
            k = tl.load(key, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(value, mask=inside_v, other=0.0).to(tl.float32)
            if DECAY:
                edge = tl.load(forward if sweep else backward, mask=step > 0, other=0.0)
                state *= tl.exp2(edge * LOG2_E)
            if sweep:  # this one counts the token itself
                state += k[:, None] * v[None, :]
                y = tl.load(output, mask=inside_v, other=0.0) + tl.sum(q[:, None] * state, 0)
            else:
                y = tl.sum(q[:, None] * state, 0)
                state += k[:, None] * v[None, :]
            tl.store(output, y, mask=inside_v)
            query += hop * q_l
            key += hop * k_l
            value += hop * v_l
            output += hop * o_l
            forward += sweep * forward_l
            backward -= backward_l
        query += q_l
        key += k_l
        value += v_l
        output += o_l
        tl.debug_barrier()  # the second sweep reads what other threads of the program wrote


def _power(n: int) -> int:
    """The power of two that holds n, and at least the 16 that a matrix product takes."""
    return max(16, triton.next_power_of_2(n))


def blocks_of(kernel: str, element: int, head: int) -> Blocks:
    """The first row of the table that holds the head, for so many bytes an element."""
    return next(row for (size, largest), row in BLOCKS[kernel].items() if size == element and head <= largest)


class _Call:
    """Sizes, prefix sums and launches that the two passes share; the arguments are those of `fused_forward`."""

    def __init__(self, query, value, forward, backward, order, mask, seed, dropout, scale, normalize, chunk_size):
        self.seed, self.dropout = seed, dropout
        self.batch, self.heads, self.length, self.head = query.shape
        self.value_head, self.rows, self.element = value.shape[-1], query.shape[0] * query.shape[1], value.element_size()
        self.normalize, self.order, self.mask = normalize, order, None if mask is None else mask.contiguous()
        self.orders = 0 if forward is None else forward.shape[0]
        self.sides = 2 if self.orders else 1  # without decay both directions have one state
        self.scale = scale / max(self.orders, 1)
        self.chunk = min(chunk_size or default_chunk_size(self.length, "cuda")[0], self.length)
        self.states = self.chunk < self.length
        self.tiles = self.orders > 0 or not self.states
        if not self.tiles:
            self.chunk = PLAIN_CHUNK_SIZE
        self.count = triton.cdiv(self.length, self.chunk)
        self.elements = self.head * self.value_head + self.head * normalize
        # Kernels do not read what they are given in the place of a tensor that there is not.
        self.sums = self.totals = self.none = query
        self.sums_strides = (0, 0)
        if self.orders:
            self._add_sums(forward, backward)

    def _add_sums(self, forward, backward) -> None:
        """F and B of the tokens, and the decays over whole chunks, for as many rows and heads as the edges differ in."""
        batch, heads = forward.shape[1:3]
        self.sums = forward.new_empty(batch, heads, self.orders, 2, 2, self.length)
        self.totals = forward.new_empty(batch, heads, self.orders, 2, 2, self.count)
        self.sums_strides = [0 if n == 1 else stride for n, stride in zip((batch, heads), self.sums.stride())]
        edges = [x.expand(*x.shape[:3], self.length) for x in (forward, backward)]
        sums_kernel[(batch * heads * self.orders * self.count,)](
            *edges, *self.or_none(self.order), self.sums, self.totals,
            *edges[0].stride(), *edges[1].stride(), heads=heads, length=self.length, chunk=self.chunk,
            ORDERS=self.orders, ORDERED=self.order is not None, BLOCK=self.scan_block(),
        )  # fmt: skip

    def scan_block(self) -> int:
        return min(1024, _power(self.chunk))

    def launch(self, kernel, name: str, *args, states=None, **options) -> None:
        """One of the three kernels that compute a chunk block by block."""
        blocks = blocks_of(name, self.element, max(self.head, self.value_head))
        strides = (0, 0, 0) if states is None else self.states_strides(states)
        kernel[(self.rows * self.count * triton.cdiv(self.chunk, blocks.rows),)](
            *args, *self.sums_strides, *strides, heads=self.heads, length=self.length, chunk=self.chunk, scale=self.scale,
            D=self.head, DV=self.value_head, BLOCK_D=_power(self.head), BLOCK_V=_power(self.value_head), BLOCK_M=blocks.rows,
            BLOCK_N=blocks.columns, BLOCK_S=min(blocks.slices, _power(max(self.head, self.value_head))), ORDERS=self.orders,
            RASTER=self.orders == 1 and self.order is None, TILES=self.tiles, STATES=self.states, SIDES=self.sides,
            NORMALIZE=self.normalize, MASKED=self.mask is not None, DROPOUT=self.seed is not None, dropout=self.dropout,
            seed=self.none if self.seed is None else self.seed,
            num_warps=blocks.warps, num_stages=blocks.stages, **options,
        )  # fmt: skip

    def states_strides(self, states) -> tuple[int, int, int]:
        """Of heads, directions and chunks, which without decay share one state."""
        return *states.stride()[:2], states.stride(2) if states.shape[2] > 1 else 0

    def write_states(self, x, y, divisor=None, delta=None, backward=False) -> torch.Tensor | None:
        """The states in front of every chunk, (B * H, directions, N, elements), or one for all without decay.

        x and y are key and value; or query and the output's gradient, with divisor and delta, for the states' gradients.
        """
        if not self.states:
            return None
        blocks = blocks_of("write_states", self.element, max(self.head, self.value_head))
        tile_d, tile_v = min(_power(self.head), blocks.slices), min(_power(self.value_head), blocks.columns)
        tiles = triton.cdiv(self.head, tile_d) * triton.cdiv(self.value_head, tile_v)
        states = x.new_empty(self.rows, self.sides, self.count, self.elements, dtype=torch.float32)
        write_states_kernel[(self.rows * self.count * tiles,)](
            x, y, states, self.sums, self.totals, *self.or_none(self.mask, divisor, delta),
            *x.stride(), *y.stride(), *self.sums_strides, *states.stride()[:3],
            scale=self.scale, heads=self.heads, length=self.length, chunk=self.chunk,
            D=self.head, DV=self.value_head, BLOCK_D=tile_d, BLOCK_V=tile_v, BLOCK=blocks.rows, DECAY=self.orders > 0,
            NORMALIZE=self.normalize, MASKED=self.mask is not None, BACKWARD=backward,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        if not self.orders:
            return states.sum(2, keepdim=True)
        block = min(256, _power(self.elements))
        pass_states_kernel[(self.rows * self.sides * triton.cdiv(self.elements, block),)](
            states, self.totals, *self.sums_strides, *states.stride()[:3], heads=self.heads, length=self.length,
            chunk=self.chunk, elements=self.elements, BLOCK=block, BACKWARD=backward,
        )  # fmt: skip
        return states

    def grad_edges(self, grad_sums, states, grad_states) -> list[torch.Tensor]:
        """Gradients of the edges in both directions, (K, B, H, L), from those of the sums, (B, H, K, 2, L)."""
        edges = [grad_sums.new_empty(self.orders, self.batch, self.heads, self.length) for _ in range(2)]
        if self.orders:
            strides = (0, 0, 0) if states is None else self.states_strides(states)
            grad_edges_kernel[(self.rows * self.orders * self.count,)](
                grad_sums, *self.or_none(states, grad_states, self.order), *edges, *strides,
                batch=self.batch, heads=self.heads, length=self.length, chunk=self.chunk, elements=self.elements,
                ORDERS=self.orders, ORDERED=self.order is not None, STATES=self.states, BLOCK=self.scan_block(),
            )  # fmt: skip
        return edges

    def or_none(self, *tensors) -> list[torch.Tensor]:
        return [self.none if x is None else x for x in tensors]


@torch.library.custom_op("lion_hf::fused_features", mutates_args=())
def fused_features(
    x: torch.Tensor, grad: torch.Tensor | None, mask: torch.Tensor | None, name: str, dtype: torch.dtype
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
            x, other, result, x if mask is None else mask.contiguous(), *x.stride(), *other.stride(), *result.stride(),
            heads=heads, length=length, D=head, BLOCK_D=width, BLOCK=block, NAME=name, MASKED=mask is not None,
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
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
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
        forward: log-decays left to right in reading order, (K, B or 1, H or 1, L or 1), float32, or None for no decay.
        backward: log-decays right to left, likewise.
        order: (K, L) reading orders, for rows of one chunk; None if K is 1 and tokens are read as they stand.
        mask: (B, L), False where a token is padding, whose gates are 1.
        seed: one integer, from which it follows which masked scores are dropped, for rows of one chunk; None if none is.
        dropout: probability of dropping one.
        scale: factor of the scores.
        normalize: whether to divide by the sum of the masked scores.
        eps: added to that sum.
        chunk_size: tokens a chunk, chosen if None.
        dtype: type of the result.

    Returns:
        (B, H, L, Dv), and the divisor, (B, H, L) in float32, which is empty without `normalize`.
    """
    output = torch.empty_like(value, dtype=dtype)
    divisor = query.new_empty(query.shape[:3] if normalize else 0, dtype=torch.float32)
    if value.numel() == 0:
        return output, divisor
    with torch.cuda.device_of(value):
        call = _Call(query, value, forward, backward, order, mask, seed, dropout, scale, normalize, chunk_size)
        states = call.write_states(key, value)
        call.launch(
            forward_kernel, "forward", query, key, value, output, divisor, *call.or_none(states), call.sums,
            *call.or_none(call.mask), *query.stride(), *key.stride(), *value.stride(), *output.stride(), states=states, eps=eps,
        )  # fmt: skip
    return output, divisor


@fused_forward.register_fake
def _(query, key, value, forward, backward, order, mask, seed, dropout, scale, normalize, eps, chunk_size, dtype):
    return torch.empty_like(value, dtype=dtype), query.new_empty(query.shape[:3] if normalize else 0, dtype=torch.float32)


@torch.library.custom_op("lion_hf::fused_backward", mutates_args=())
def fused_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
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
    """Gradients of `fused_forward` with respect to its first five tensors; those of absent decays are empty."""
    grads = [torch.empty_like(x) for x in (query, key, value)]
    if grads[2].numel() == 0:
        return *(x.zero_() for x in grads), *(_like_or_empty(x, query).zero_() for x in (forward, backward))
    with torch.cuda.device_of(value):
        call = _Call(query, value, forward, backward, order, mask, seed, dropout, scale, normalize, chunk_size)
        places = None
        if order is not None:  # its inverse, for less than a sort
            steps = torch.arange(call.length, device=order.device).expand_as(order)
            places = torch.empty_like(order).scatter_(1, order, steps)
        delta = torch.empty_like(divisor)
        grad_sums = query.new_empty(*query.shape[:2], call.orders, 2, call.length, dtype=torch.float32)
        kinds = {"KINDS": triton.next_power_of_2(max(call.orders, 1))}
        inputs = [grad, query, key, value]
        strides = [stride for x in inputs for stride in x.stride()]
        states = call.write_states(key, value)
        result = output if normalize else grad
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
    if forward is None:
        return *grads, *(query.new_empty(0) for _ in range(2))
    return *grads, *(x.sum_to_size(forward.shape) for x in edges)


def _like_or_empty(x: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    return query.new_empty(0) if x is None else torch.empty_like(x)


@fused_backward.register_fake
def _(grad, query, key, value, forward, backward, *others):
    return *(torch.empty_like(x) for x in (query, key, value)), *(_like_or_empty(x, query) for x in (forward, backward))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.dropout, ctx.scale, ctx.normalize, _, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, output[0] if ctx.normalize else None, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: torch.Tensor, _):
    tensors = ctx.saved_tensors
    *grads, forward, backward = fused_backward(grad, *tensors, ctx.dropout, ctx.scale, ctx.normalize, ctx.chunk_size)
    if tensors[3] is None:
        forward = backward = None
    return *grads, forward, backward, *(None,) * 9


fused_forward.register_autograd(_backward, setup_context=_setup_context)


def fused_chunkwise(query, key, value, forward, backward, scale: float, chunk_size: int | None) -> torch.Tensor:
    """The chunk form of one order; arguments and result as in `lion_chunkwise.chunkwise`."""
    decays = (None if x is None else x[None] for x in (forward, backward))
    return fused_forward(query, key, value, *decays, *(None,) * 3, 0.0, scale, False, 0.0, chunk_size, torch.float32)[0]


@torch.library.custom_op("lion_hf::fused_recurrent", mutates_args=())
def fused_recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
) -> torch.Tensor:
    """The recurrent form, without gradients; arguments and result as in `lion_naive.recurrent`."""
    output = torch.empty_like(value, dtype=torch.float32)
    if output.numel() == 0:
        return output
    batch, heads, length, head = query.shape
    value_head = value.shape[-1]
    edges = (query, query) if forward is None else [x.expand(batch, heads, length) for x in (forward, backward)]
    columns = min(_power(value_head), max(16, STATE_SIZE // _power(head)))
    with torch.cuda.device_of(value):
        recurrent_kernel[(batch * heads * triton.cdiv(value_head, columns),)](
            query, key, value, output, *edges, *(s for x in (query, key, value, output) for s in x.stride()),
            *edges[0].stride()[:3], *edges[1].stride()[:3], scale=scale, heads=heads, length=length,
            D=head, DV=value_head, BLOCK_D=_power(head), BLOCK_V=columns, DECAY=forward is not None,
        )  # fmt: skip
    return output


@fused_recurrent.register_fake
def _(query, key, value, forward, backward, scale, chunk_size):
    return torch.empty_like(value, dtype=torch.float32)
