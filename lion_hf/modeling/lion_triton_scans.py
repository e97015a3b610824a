"""The GPU kernels that scan a row or map its tokens; lion_triton_launch.py launches them.

See lion_triton_parts.py for the mathematics and the names. `ltr` means left to right, and
`rtl` right to left.
"""

from .lion_triton_parts import (
    RUNTIME,
    load_tile,
    place_of_program,
    store_tile,
    tl,
    tokens_to_read,
    triton,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _store_sums(base, place, length, sums, inside):
    """A float64 number as two float32 numbers."""
    high = sums.to(tl.float32)
    tl.store(base + place, high, mask=inside)
    tl.store(base + length + place, (sums - high.to(tl.float64)).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def sums_kernel(
    ltr, rtl, order, sums, totals,
    ltr_k, ltr_b, ltr_h, ltr_l, rtl_k, rtl_b, rtl_h, rtl_l, heads, length, chunk,
    ORDERS: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """F, sums over a chunk's edges before a token, and B, over those behind it.

    B includes the edge to the next chunk. Reads edges, (K, B, H, L), in reading order. Writes sums,
    (B, H, K, 2, 2, L), at the tokens' places, and totals over chunks, (B, H, K, 2, 2, N): for F and
    for B a high and a low part.
    """
    count = tl.cdiv(length, chunk)
    program = tl.program_id(0)
    n = program % count
    row = (program // count).to(tl.int64)
    k, h, b = row % ORDERS, row // ORDERS % heads, row // ORDERS // heads
    ltr += k * ltr_k + b * ltr_b + h * ltr_h
    rtl += k * rtl_k + b * rtl_b + h * rtl_h
    sums += row * 4 * length
    begin = n * chunk
    size = tl.minimum(chunk, length - begin)
    left = tl.zeros((1,), tl.float64)
    right = tl.zeros((1,), tl.float64)
    for start in range(0, size, BLOCK):
        steps = start + tl.arange(0, BLOCK)
        step = begin + steps  # left to right, each token without its own edge
        edge = tl.load(
            ltr + step.to(tl.int64) * ltr_l, mask=(steps < size) & (step < length - 1), other=0.0
        )
        edge = edge.to(tl.float64) * LOG2_E
        place = tl.load(order + k * length + step, mask=steps < size, other=0) if ORDERED else step
        _store_sums(sums, place, length, left + tl.cumsum(edge, 0) - edge, steps < size)
        left += tl.sum(edge, 0)
        step = begin + size - 1 - steps  # right to left, each token with its own edge
        inside = (steps < size) & (step < length - 1)  # the row's last entry belongs to no edge
        edge = (
            tl.load(rtl + step.to(tl.int64) * rtl_l, mask=inside, other=0.0).to(tl.float64) * LOG2_E
        )
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
    """Passes the states along the chunks in place: a chunk gets what those before or behind leave.

    Left states go from the first chunk to the last and right ones back; in the backward pass it is
    the other way round.
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
    grad_sums, states, grad_states, order, grad_ltr, grad_rtl,
    states_h, states_side, states_n, batch, heads, length, chunk, elements,
    ORDERS: tl.constexpr, ORDERED: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the edges, (K, B, H, L) in reading order, from those of the chunks' sums.

    Within its chunk, an edge belongs to F of all later tokens and to B of itself and all earlier
    ones. It also belongs to the chunk's whole decay, with which S and T are passed on:
    <S behind the chunk, U> and <T before the chunk, W>.
    """
    count = tl.cdiv(length, chunk)
    program = tl.program_id(0)
    n = program % count
    row = (program // count).to(tl.int64)
    k, head = row % ORDERS, row // ORDERS
    begin = n * chunk
    size = tl.minimum(chunk, length - begin)
    grad_sums += row * 2 * length
    grad_ltr += (k * batch * heads + head) * length
    grad_rtl += (k * batch * heads + head) * length
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
            right += tl.sum(
                state * tl.load(grad_states + states_side + start + steps, mask=inside, other=0.0),
                0,
            )
    for start in range(0, size, BLOCK):
        inside = start + steps < size
        step = begin + size - 1 - start - steps
        place = tl.load(order + k * length + step, mask=inside, other=0) if ORDERED else step
        change = tl.load(grad_sums + place, mask=inside, other=0.0).to(tl.float64)
        total = tl.where(step < length - 1, left + tl.cumsum(change, 0) - change, 0.0)
        tl.store(grad_ltr + step, total.to(tl.float32), mask=inside)
        left += tl.sum(change, 0)
        step = begin + start + steps
        place = tl.load(order + k * length + step, mask=inside, other=0) if ORDERED else step
        change = tl.load(grad_sums + length + place, mask=inside, other=0.0).to(tl.float64)
        # the last entry belongs to no edge
        total = tl.where(step < length - 1, right + tl.cumsum(change, 0), 0.0)
        tl.store(grad_rtl + step, total.to(tl.float32), mask=inside)
        right += tl.sum(change, 0)


@triton.jit(do_not_specialize=RUNTIME)
def recurrent_kernel(
    query, key, value, output, ltr, rtl,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, o_b, o_h, o_l, o_d,
    ltr_b, ltr_h, ltr_l, rtl_b, rtl_h, rtl_l, scale, heads, length,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr,
):  # fmt: skip
    """The recurrent form for some columns of the values.

    One sweep from right to left and one back, with a state in registers.
    """
    tiles = tl.cdiv(DV, BLOCK_V)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    dims = tl.arange(0, BLOCK_D)
    columns = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    inside, inside_v = dims < D, columns < DV
    last = (length - 1).to(tl.int64)
    query += b * q_b + h * q_h + last * q_l + dims * q_d
    key += b * k_b + h * k_h + last * k_l + dims * k_d
    value += b * v_b + h * v_h + last * v_l + columns * v_d
    output += b * o_b + h * o_h + last * o_l + columns * o_d
    ltr += b * ltr_b + h * ltr_h - ltr_l
    rtl += b * rtl_b + h * rtl_h + last * rtl_l
    for sweep in tl.static_range(2):
        state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
        hop = 2 * sweep - 1
        for step in range(length):
            q = tl.load(query, mask=inside, other=0.0).to(tl.float32) * scale
            k = tl.load(key, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(value, mask=inside_v, other=0.0).to(tl.float32)
            if DECAY:
                edge = tl.load(ltr if sweep else rtl, mask=step > 0, other=0.0)
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
            ltr += sweep * ltr_l
            rtl -= rtl_l
        query += q_l
        key += k_l
        value += v_l
        output += o_l
        tl.debug_barrier()  # the second sweep reads what other threads of the program wrote


@triton.jit(do_not_specialize=RUNTIME)
def features_kernel(
    x, grad, result, mask,
    x_b, x_h, x_l, x_d, g_b, g_h, g_l, g_d, r_b, r_h, r_l, r_d, heads, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, NAME: tl.constexpr,
    MASKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The feature map of query or key, (B, H, L, D), or their gradient; 0 at padding.

    Inside the kernels of products a source would be mapped again for every block of targets.
    """
    row, b, h, _, _, first, end = place_of_program(length, length, heads, BLOCK)
    tokens = first + tl.arange(0, BLOCK)
    keep = tokens_to_read(mask + b * length, tokens, end, MASKED)
    x = load_tile(
        x + b * x_b + h * x_h + first.to(tl.int64) * x_l, x_l, x_d, keep, 0, D, BLOCK_D, tl.float32
    )
    if NAME == "elu_plus_one":
        y = tl.where(x > 0, x + 1, tl.exp(x))
        slope = tl.where(x > 0, 1.0, y)
    elif NAME == "sqrt_softmax":
        x = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], x, float("-inf"))
        y = tl.exp((x - tl.max(x, 1)[:, None]) * 0.5)
        y /= tl.sqrt(tl.sum(y * y, 1))[:, None]
        slope = y * 0.5
    else:
        tl.static_assert(NAME == "normalized_silu")
        gate = tl.sigmoid(x)
        y = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], x * gate + 0.5, 0.0)
        unit = (
            1
            / tl.maximum(tl.sqrt(tl.sum(y * y, 1)), 1e-12, propagate_nan=tl.PropagateNan.ALL)[
                :, None
            ]
        )
        y *= unit
        slope = gate * (1 + x * (1 - gate)) * unit
    if BACKWARD:
        g = load_tile(
            grad + b * g_b + h * g_h + first.to(tl.int64) * g_l,
            g_l,
            g_d,
            keep,
            0,
            D,
            BLOCK_D,
            tl.float32,
        )
        if NAME != "elu_plus_one":  # the part along the unit vector changes nothing
            g -= tl.sum(g * y, 1)[:, None] * y
        y = g * slope
    result += b * r_b + h * r_h + first.to(tl.int64) * r_l
    store_tile(result, r_l, r_d, tokens < end, tl.where(keep[:, None], y, 0.0), D)
