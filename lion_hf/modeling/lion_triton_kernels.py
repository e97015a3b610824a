"""The GPU kernels behind lion_triton.py, which launches them and says what they compute.

A row is cut into chunks. With F_i the log-decay (to base 2) from a chunk's first token to its token i, read left to right,
and B_i the one from the token behind the chunk to i, read right to left,

    M_ij = 2 ** min(F_i - F_j, B_i - B_j)       within a chunk, for tokens in any order (see lion_chunkwise.py)
         = 2 ** (F_i - F_r) * 2 ** (F_r - F_j)  for r between them, j before i: a block beside the diagonal needs two vectors
    y_i  = sum_j M_ij (q_i . k_j) v_j + 2 ** F_i q_i . S + 2 ** B_i q_i . T

S and T being what the chunks before and behind have left. Swapping sources and targets gives the gradients. No exponent is
above 0. Sums are two float32 numbers, a high and a low part, whose differences are as exact as float64's.

In every kernel axis 0 of the grid counts all blocks of all heads, since the others end at 65,535; a block's address is
computed in 64 bits and the places inside it in 32. `_l`, `_d`, `_h` and `_b` behind a tensor's letter are its strides along
length, head size, heads and batch. D and DV are the head sizes, BLOCK_D and BLOCK_V powers of two that hold them.
"""

import os

try:
    import triton
    from triton import language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; the torch forms do not") from error

# The log-decay of a target that does not exist: its exponents are far below those of every float32.
FAR = tl.constexpr(-1e30)
# Products of float32: three of tf32, with an error of 1e-6; tf32 alone leaves 5e-4. Half types do not read this.
PRECISION = tl.constexpr("tf32x3")
# The interpreter takes a bfloat16 operand of a product for an integer, so it gets them as float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Sizes that change from call to call: one compiled kernel serves all of them. Strides of tensors with heads as rows are not
# among them: whether 16 divides them decides how wide the loads are.
RUNTIME = ["batch", "heads", "length", "chunk", "elements", "scale", "eps", "dropout", "sums_b", "sums_h"]
RUNTIME += ["forward_k", "forward_b", "forward_h", "backward_k", "backward_b", "backward_h"]


@triton.jit
def _dot(a, b, total=None):
    """total + a @ b in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """x in another type; float16 saturates instead of overflowing."""
    if dtype == tl.float16:
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def _tile(base, row_stride, column_stride, keep, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Rows of a matrix from `column` on, (rows, COLUMNS), zero in rows that are not kept and behind its last column."""
    rows, columns = tl.arange(0, keep.shape[0]), column + tl.arange(0, COLUMNS)
    inside = keep[:, None]
    if WIDTH % COLUMNS != 0:
        inside = inside & (columns < WIDTH)[None, :]
    x = tl.load(base + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)
    return x if x.dtype == dtype else _narrow(x, dtype)


@triton.jit
def _store_tile(base, row_stride, column_stride, keep, x, WIDTH: tl.constexpr):
    rows, columns = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    inside = keep[:, None]
    if x.shape[1] != WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    places = base + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(places, _narrow(x, base.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def features_kernel(
    x, grad, result, mask, x_b, x_h, x_l, x_d, g_b, g_h, g_l, g_d, r_b, r_h, r_l, r_d, heads, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, NAME: tl.constexpr, MASKED: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """The feature map of query or key, (B, H, L, D), or their gradient from that of the features; 0 at padding.

    Inside the kernels of products a source would be mapped again for every block of targets.
    """
    row, b, h, _, _, first, end = _place(length, length, heads, BLOCK)
    tokens = first + tl.arange(0, BLOCK)
    keep = _tokens_to_read(mask + b * length, tokens, end, MASKED)
    x = _tile(x + b * x_b + h * x_h + first.to(tl.int64) * x_l, x_l, x_d, keep, 0, D, BLOCK_D, tl.float32)
    if NAME == "elu_plus_one":
        y = tl.where(x > 0, x + 1, tl.exp(x))
        slope = tl.where(x > 0, 1.0, y)
    else:
        tl.static_assert(NAME == "normalized_silu")
        gate = tl.sigmoid(x)
        y = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], x * gate + 0.5, 0.0)
        unit = 1 / tl.maximum(tl.sqrt(tl.sum(y * y, 1)), 1e-12, propagate_nan=tl.PropagateNan.ALL)[:, None]
        y *= unit
        slope = gate * (1 + x * (1 - gate)) * unit
    if BACKWARD:
        g = _tile(grad + b * g_b + h * g_h + first.to(tl.int64) * g_l, g_l, g_d, keep, 0, D, BLOCK_D, tl.float32)
        if NAME == "normalized_silu":  # the part along the unit vector changes nothing
            g -= tl.sum(g * y, 1)[:, None] * y
        y = g * slope
    result += b * r_b + h * r_h + first.to(tl.int64) * r_l
    _store_tile(result, r_l, r_d, tokens < end, tl.where(keep[:, None], y, 0.0), D)


@triton.jit
def _place(length, chunk, heads, BLOCK: tl.constexpr):
    """The program's head as one number and as (batch, head), its chunk, and where chunk, block and chunk's end are."""
    blocks, count = tl.cdiv(chunk, BLOCK), tl.cdiv(length, chunk)
    program = tl.program_id(0)
    n = program // blocks % count
    row = (program // (blocks * count)).to(tl.int64)
    begin = n * chunk
    end = tl.minimum(begin + chunk, length)
    return row, row // heads, row % heads, n, begin, begin + program % blocks * BLOCK, end


@triton.jit
def _tokens_to_read(mask, tokens, end, MASKED: tl.constexpr):
    """Which tokens are in the chunk and no padding."""
    keep = tokens < end
    if MASKED:
        keep = tl.load(mask + tokens, mask=keep, other=0) != 0
    return keep


@triton.jit
def _sums_at(base, tokens, end, length, SOURCES: tl.constexpr):
    """High and low parts of F or B; where no token is they make a source's exponents at most 0 and a target's -inf."""
    keep = tokens < end
    high = tl.load(base + tokens, mask=keep, other=0.0 if SOURCES else FAR)
    return high, tl.load(base + length + tokens, mask=keep, other=0.0)


@triton.jit
def _factor(base, tokens, reference, end, length, SOURCES: tl.constexpr):
    """Decay between tokens and a token between them and the other block: one of the two vectors of a mask's block."""
    high, low = _sums_at(base, tokens, end, length, SOURCES)
    exponent = (high - tl.load(base + reference)) + (low - tl.load(base + length + reference))
    return tl.exp2(-exponent if SOURCES else exponent)


@triton.jit
def _row_factors(sums, rows, first, last, end, length, SOURCES: tl.constexpr):
    """The rows' vectors for the blocks of columns before them and behind them."""
    before = _factor(sums + 2 * length if SOURCES else sums, rows, first, end, length, SOURCES)
    behind = _factor(sums if SOURCES else sums + 2 * length, rows, last, end, length, SOURCES)
    return before, behind


@triton.jit
def _order_mask(sums, rows, columns, end, length, SOURCES: tl.constexpr):
    """The mask of one order between any two blocks, exact to float32; the rows are the sources or else the targets."""
    row_high, row_low = _sums_at(sums, rows, end, length, SOURCES)
    column_high, column_low = _sums_at(sums, columns, end, length, not SOURCES)
    left = (row_high[:, None] - column_high[None, :]) + (row_low[:, None] - column_low[None, :])
    row_high, row_low = _sums_at(sums + 2 * length, rows, end, length, SOURCES)
    column_high, column_low = _sums_at(sums + 2 * length, columns, end, length, not SOURCES)
    right = (row_high[:, None] - column_high[None, :]) + (row_low[:, None] - column_low[None, :])
    return tl.exp2(-tl.maximum(left, right) if SOURCES else tl.minimum(left, right))


@triton.jit
def _block_mask(sums, rows, columns, before, behind, first, last, start, end, length, SOURCES: tl.constexpr):
    """The mask of one order that reads the tokens as they stand: two vectors, but for blocks on the diagonal."""
    left, right = sums, sums + 2 * length
    if start + columns.shape[0] <= first:
        mask = before[:, None] * _factor(right if SOURCES else left, columns, first, end, length, not SOURCES)[None, :]
    elif start > last:
        mask = behind[:, None] * _factor(left if SOURCES else right, columns, last, end, length, not SOURCES)[None, :]
    else:
        mask = _order_mask(sums, rows, columns, end, length, SOURCES)
    return mask


@triton.jit
def _state_factors(sums, totals, tokens, n, end, length, chunk, DECAY: tl.constexpr, WRITE: tl.constexpr):
    """Decays from the chunk's left and right edge to tokens that read a state, or to the other edge from those that write."""
    left = tl.full(tokens.shape, 1.0, tl.float32)
    right = left
    if DECAY:
        left_high, left_low = _sums_at(sums, tokens, end, length, WRITE)
        right_high, right_low = _sums_at(sums + 2 * length, tokens, end, length, WRITE)
        if WRITE:  # the whole chunk's decay less that up to the token
            count = tl.cdiv(length, chunk)
            totals += n
            left_high, left_low = tl.load(totals) - left_high, tl.load(totals + count) - left_low
            right_high, right_low = tl.load(totals + 2 * count) - right_high, tl.load(totals + 3 * count) - right_low
        left, right = tl.exp2(left_high + left_low), tl.exp2(right_high + right_low)
    return left, right


@triton.jit
def _state_product(x, state, factor, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """factor * (x @ state), where the state's float32 numbers need not fit into the range of x's type."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    state = tl.load(state + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)
    unit = 1.0
    if x.dtype == tl.float16:
        unit = tl.maximum(tl.max(tl.max(tl.abs(state), 1), 0) / 32768.0, 1.0)
    return _dot(x, (state / unit).to(x.dtype)) * (factor * unit)[:, None]


@triton.jit
def _read_states(
    base, row_stride, column_stride, keep, state, states_side, left, right, total, norm, dtype: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr, SIDES: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Adds to total and norm what the tokens, (rows, D), read from the states of both directions, (D, DV) and (D)."""
    columns = tl.arange(0, total.shape[1])
    for d in range(0, D, BLOCK_S):
        x = _tile(base, row_stride, column_stride, keep, d, D, BLOCK_S, dtype)
        dims = d + tl.arange(0, BLOCK_S)
        for side in tl.static_range(SIDES):
            place, factor = state + side * states_side, left if side == 0 else right
            total += _state_product(x, place, factor, dims, columns, DV, 1, D, DV)
            if NORMALIZE:
                z = tl.load(place + D * DV + dims, mask=dims < D, other=0.0)
                norm += tl.sum(x * z[None, :], 1) * factor
    return total, norm


@triton.jit
def _read_states_back(
    base, row_stride, column_stride, keep, state, states_side, left, right, change, own, total, of_left, of_right,
    dtype: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr, SIDES: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The like for tokens (rows, DV), whose one divisor weighs `change`; of_left and of_right get what `own` receives."""
    dims = tl.arange(0, total.shape[1])
    for side in tl.static_range(SIDES):
        place, factor = state + side * states_side, left if side == 0 else right
        received = tl.zeros(total.shape, tl.float32)
        if NORMALIZE:
            z = tl.load(place + D * DV + dims, mask=dims < D, other=0.0)
            received += (factor * change)[:, None] * z[None, :]
        for d in range(0, DV, BLOCK_S):
            x = _tile(base, row_stride, column_stride, keep, d, DV, BLOCK_S, dtype)
            received += _state_product(x, place, factor, d + tl.arange(0, BLOCK_S), dims, 1, DV, DV, D)
        total += received
        if side == 0:
            of_left += tl.sum(own * received, 1)[:, None]
        else:
            of_right += tl.sum(own * received, 1)[:, None]
    return total, of_left, of_right


@triton.jit(do_not_specialize=RUNTIME)
def write_states_kernel(
    x, y, states, sums, totals, mask, divisor, delta,
    x_b, x_h, x_l, x_d, y_b, y_h, y_l, y_d, sums_b, sums_h, states_h, states_side, states_n, scale, heads, length, chunk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the states of both directions, sum_j factor_j x_j y_j, in one read of x and y.

    Forward x and y are key and value. Backward they are query and gradient, for the gradients of the states; the factors are
    then those of reading, times scale / divisor. Behind a state's D * DV numbers stand the D of its divisor.
    """
    count = tl.cdiv(length, chunk)
    tiles_d, tiles_v = tl.cdiv(D, BLOCK_D), tl.cdiv(DV, BLOCK_V)
    program = tl.program_id(0)
    d = program % tiles_d * BLOCK_D
    v = program // tiles_d % tiles_v * BLOCK_V
    n = program // (tiles_d * tiles_v) % count
    row = (program // (tiles_d * tiles_v * count)).to(tl.int64)
    b, h = row // heads, row % heads
    begin = n * chunk
    end = tl.minimum(begin + chunk, length)
    x += b * x_b + h * x_h + begin.to(tl.int64) * x_l
    y += b * y_b + h * y_h + begin.to(tl.int64) * y_l
    mask += b * length
    sums += b * sums_b + h * sums_h
    totals += (b * sums_b + h * sums_h) // length * count
    dtype: tl.constexpr = y.dtype.element_ty
    left, right = tl.zeros((BLOCK_D, BLOCK_V), tl.float32), tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    z_left, z_right = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        keep = _tokens_to_read(mask, tokens, end, MASKED)
        xs = _tile(x, x_l, x_d, keep, d, D, BLOCK_D, dtype)
        ys = _tile(y, y_l, y_d, keep, v, DV, BLOCK_V, dtype)
        to_left, to_right = _state_factors(sums, totals, tokens, n, end, length, chunk, DECAY, not BACKWARD)
        if BACKWARD:
            weight = scale
            if NORMALIZE:
                weight = scale / tl.load(divisor + row * length + tokens, mask=tokens < end, other=1.0)
            to_left, to_right = to_left * weight, to_right * weight
        left = _dot(tl.trans(xs), _narrow(ys * to_left[:, None], dtype), left)
        if DECAY:
            right = _dot(tl.trans(xs), _narrow(ys * to_right[:, None], dtype), right)
        if NORMALIZE:
            if BACKWARD:
                change = tl.load(delta + row * length + tokens, mask=tokens < end, other=0.0)
                to_left, to_right = to_left * change, to_right * change
            z_left += tl.sum(xs * to_left[:, None], 0)
            z_right += tl.sum(xs * to_right[:, None], 0)
        x += BLOCK * x_l
        y += BLOCK * y_l
    dims, columns = d + tl.arange(0, BLOCK_D), v + tl.arange(0, BLOCK_V)
    inside = (dims < D)[:, None] & (columns < DV)[None, :]
    states += row * states_h + n.to(tl.int64) * states_n
    tl.store(states + dims[:, None] * DV + columns[None, :], left, mask=inside)
    if NORMALIZE:
        tl.store(states + D * DV + dims, z_left, mask=(dims < D) & (v == 0))
    if DECAY:
        states += states_side
        tl.store(states + dims[:, None] * DV + columns[None, :], right, mask=inside)
        if NORMALIZE:
            tl.store(states + D * DV + dims, z_right, mask=(dims < D) & (v == 0))


@triton.jit
def _split_pairs(pairs, rows, columns, before, behind):
    """Adds sums over the columns that come before their row to `before`, and over those that come behind it to `behind`.

    Neither gets the diagonal, which no decay reaches: beside gates near 0 it is a million times as large as all others.
    """
    before += tl.sum(tl.where(columns[None, :] < rows[:, None], pairs, 0.0), 1)[:, None]
    behind += tl.sum(tl.where(columns[None, :] > rows[:, None], pairs, 0.0), 1)[:, None]
    return before, behind


@triton.jit
def _raster_pairs(pairs, rows, columns, first, last, start, before, behind):
    """The like for tokens that are read as they stand, where most blocks are on one side of the diagonal."""
    if start + columns.shape[0] <= first:
        before += tl.sum(pairs, 1)[:, None]
    elif start > last:
        behind += tl.sum(pairs, 1)[:, None]
    else:
        before, behind = _split_pairs(pairs, rows, columns, before, behind)
    return before, behind


@triton.jit
def _order_pairs(pairs, sums, places, rows, columns, end, length, before, behind, ORDERS: tl.constexpr, SOURCES: tl.constexpr):
    """The like for several orders, each in a column of its own, of pairs without mask; and the sum of the masks."""
    total = tl.zeros(pairs.shape, tl.float32)
    for i in tl.static_range(ORDERS):
        order_mask = _order_mask(sums + i * 4 * length, rows, columns, end, length, SOURCES)
        total += order_mask
        row_places = tl.load(places + i * length + rows, mask=rows < end, other=0)
        column_places = tl.load(places + i * length + columns, mask=columns < end, other=0)
        left, right = _split_pairs(pairs * order_mask, row_places, column_places, 0.0, 0.0)
        this = (tl.arange(0, before.shape[1]) == i)[None, :]
        before, behind = before + tl.where(this, left, 0.0), behind + tl.where(this, right, 0.0)
    return total, before, behind


@triton.jit
def _kept(seed, dropout, row, targets, sources, length):
    """1 / (1 - dropout) for scores that are kept, else 0; by Philox-7 (Salmon et al., 2011), which every pass repeats."""
    uniform = tl.rand(tl.load(seed) + row, targets * length + sources, n_rounds=7)
    return tl.where(uniform < dropout, 0.0, 1 / (1 - dropout))


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    query, key, value, output, divisor, states, sums, mask,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, o_b, o_h, o_l, o_d,
    sums_b, sums_h, states_h, states_side, states_n, scale, eps, heads, length, chunk, seed, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, ORDERS: tl.constexpr, RASTER: tl.constexpr, TILES: tl.constexpr,
    STATES: tl.constexpr, SIDES: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Outputs of one block of targets: sources of the same chunk block by block (TILES), the others through states."""
    row, b, h, n, begin, first, end = _place(length, chunk, heads, BLOCK_M)
    if first >= end:
        return
    dtype: tl.constexpr = value.dtype.element_ty
    mask += b * length
    sums += b * sums_b + h * sums_h
    query += b * q_b + h * q_h + first.to(tl.int64) * q_l
    rows = first + tl.arange(0, BLOCK_M)
    row_keep = _tokens_to_read(mask, rows, end, MASKED)
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    if TILES:
        key += b * k_b + h * k_h + begin.to(tl.int64) * k_l
        value += b * v_b + h * v_h + begin.to(tl.int64) * v_l
        q = _tile(query, q_l, q_d, row_keep, 0, D, BLOCK_D, dtype)
        last = tl.minimum(first + BLOCK_M, end) - 1
        if RASTER:
            before, behind = _row_factors(sums, rows, first, last, end, length, False)
        for start in range(begin, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            keep = _tokens_to_read(mask, columns, end, MASKED)
            k = _tile(key, k_l, k_d, keep, 0, D, BLOCK_D, dtype)
            v = _tile(value, v_l, v_d, keep, 0, DV, BLOCK_V, dtype)
            weights = _dot(q, tl.trans(k)) * scale
            if RASTER:
                weights *= _block_mask(sums, rows, columns, before, behind, first, last, start, end, length, False)
            elif ORDERS > 0:
                decay = _order_mask(sums, rows, columns, end, length, False)
                for i in tl.static_range(1, ORDERS):
                    decay += _order_mask(sums + i * 4 * length, rows, columns, end, length, False)
                weights *= decay
            if NORMALIZE:
                norm += tl.sum(weights, 1)
            if DROPOUT:
                weights *= _kept(seed, dropout, row, rows[:, None], columns[None, :], length)
            total = _dot(_narrow(weights, dtype), v, total)
            key += BLOCK_N * k_l
            value += BLOCK_N * v_l
    if STATES:
        left, right = _state_factors(sums, sums, rows, n, end, length, chunk, RASTER, False)
        states += row * states_h + n.to(tl.int64) * states_n
        total, norm = _read_states(
            query, q_l, q_d, row_keep, states, states_side, left * scale, right * scale, total, norm, dtype,
            D, DV, BLOCK_S, SIDES, NORMALIZE,
        )  # fmt: skip
    if NORMALIZE:
        norm += eps
        tl.store(divisor + row * length + rows, norm, mask=rows < end)
        total /= norm[:, None]
    output += b * o_b + h * o_h + first.to(tl.int64) * o_l
    _store_tile(output, o_l, o_d, rows < end, total, DV)


@triton.jit(do_not_specialize=RUNTIME)
def grad_query_kernel(
    grad, query, key, value, output, divisor, delta, grad_query, grad_sums, states, sums, places, mask,
    g_b, g_h, g_l, g_d, q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, o_b, o_h, o_l, o_d, r_b, r_h, r_l, r_d,
    sums_b, sums_h, states_h, states_side, states_n, scale, heads, length, chunk, seed, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, ORDERS: tl.constexpr, RASTER: tl.constexpr, TILES: tl.constexpr,
    KINDS: tl.constexpr, STATES: tl.constexpr, SIDES: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of targets: of query, and of F and B as far as a target receives through them.

    With delta_i = -g_i . y_i, the divisor's part, and pairs X_ij = M_ij (q_i . k_j) (g_i . v_j + delta_i), F_i gets
    sum_(j < i) X_ij + 2 ** F_i q_i . (S g_i + delta_i z), and B_i the like from the other side; all times scale / divisor_i.
    """
    row, b, h, n, begin, first, end = _place(length, chunk, heads, BLOCK_M)
    if first >= end:
        return
    dtype: tl.constexpr = value.dtype.element_ty
    mask += b * length
    sums += b * sums_b + h * sums_h
    rows = first + tl.arange(0, BLOCK_M)
    row_keep = _tokens_to_read(mask, rows, end, MASKED)
    grad += b * g_b + h * g_h + first.to(tl.int64) * g_l
    query += b * q_b + h * q_h + first.to(tl.int64) * q_l
    q = _tile(query, q_l, q_d, row_keep, 0, D, BLOCK_D, dtype)
    g = _tile(grad, g_l, g_d, row_keep, 0, DV, BLOCK_V, dtype)
    change = tl.zeros((BLOCK_M,), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32) + scale
    if NORMALIZE:
        output += b * o_b + h * o_h + first.to(tl.int64) * o_l
        y = _tile(output, o_l, o_d, row_keep, 0, DV, BLOCK_V, tl.float32)
        change = -tl.sum(g * y, 1)
        weight /= tl.load(divisor + row * length + rows, mask=rows < end, other=1.0)
        tl.store(delta + row * length + rows, change, mask=rows < end)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    kinds = tl.arange(0, KINDS)
    of_left, of_right = tl.zeros((BLOCK_M, KINDS), tl.float32), tl.zeros((BLOCK_M, KINDS), tl.float32)
    if TILES:
        key += b * k_b + h * k_h + begin.to(tl.int64) * k_l
        value += b * v_b + h * v_h + begin.to(tl.int64) * v_l
        last = tl.minimum(first + BLOCK_M, end) - 1
        if RASTER:
            before, behind = _row_factors(sums, rows, first, last, end, length, False)
        for start in range(begin, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            keep = _tokens_to_read(mask, columns, end, MASKED)
            k = _tile(key, k_l, k_d, keep, 0, D, BLOCK_D, dtype)
            v = _tile(value, v_l, v_d, keep, 0, DV, BLOCK_V, dtype)
            grad_weights = _dot(g, tl.trans(v))
            if DROPOUT:
                grad_weights *= _kept(seed, dropout, row, rows[:, None], columns[None, :], length)
            grad_weights += change[:, None]
            if RASTER:
                grad_weights *= _block_mask(sums, rows, columns, before, behind, first, last, start, end, length, False)
                pairs = _dot(q, tl.trans(k)) * grad_weights
                of_left, of_right = _raster_pairs(pairs, rows, columns, first, last, start, of_left, of_right)
            elif ORDERS > 0:
                pairs = _dot(q, tl.trans(k)) * grad_weights
                decay, of_left, of_right = _order_pairs(
                    pairs, sums, places, rows, columns, end, length, of_left, of_right, ORDERS, False
                )
                grad_weights *= decay
            result = _dot(_narrow(grad_weights, dtype), k, result)
            key += BLOCK_N * k_l
            value += BLOCK_N * v_l
    if STATES:
        left, right = _state_factors(sums, sums, rows, n, end, length, chunk, RASTER, False)
        states += row * states_h + n.to(tl.int64) * states_n
        result, of_left, of_right = _read_states_back(
            grad, g_l, g_d, row_keep, states, states_side, left, right, change, q, result, of_left, of_right, dtype,
            D, DV, BLOCK_S, SIDES, NORMALIZE,
        )  # fmt: skip
    grad_query += b * r_b + h * r_h + first.to(tl.int64) * r_l
    _store_tile(grad_query, r_l, r_d, rows < end, result * weight[:, None], D)
    if ORDERS > 0:
        places = grad_sums + row * (2 * ORDERS) * length + (2 * kinds * length)[None, :] + rows[:, None]
        inside = (rows < end)[:, None] & (kinds < ORDERS)[None, :]
        tl.store(places, of_left * weight[:, None], mask=inside)
        tl.store(places + length, of_right * weight[:, None], mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def grad_key_value_kernel(
    grad, query, key, value, divisor, delta, grad_key, grad_value, grad_sums, states, sums, totals, places, mask,
    g_b, g_h, g_l, g_d, q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, r_b, r_h, r_l, r_d, t_b, t_h, t_l, t_d,
    sums_b, sums_h, states_h, states_side, states_n, scale, heads, length, chunk, seed, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, ORDERS: tl.constexpr, RASTER: tl.constexpr, TILES: tl.constexpr,
    KINDS: tl.constexpr, STATES: tl.constexpr, SIDES: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of sources: of key and value, and of F and B as far as a source sends through them.

    The mirror image of grad_query_kernel: blocks are (sources, targets), and the states are U and W, the gradients of S and
    T, to which chunks behind and before have added. From F_j is taken sum_(i > j) X_ij + 2 ** (F_end - F_j) k_j . (U v_j + z).
    """
    row, b, h, n, begin, first, end = _place(length, chunk, heads, BLOCK_M)
    if first >= end:
        return
    dtype: tl.constexpr = value.dtype.element_ty
    mask += b * length
    sums += b * sums_b + h * sums_h
    rows = first + tl.arange(0, BLOCK_M)
    row_keep = _tokens_to_read(mask, rows, end, MASKED)
    key += b * k_b + h * k_h + first.to(tl.int64) * k_l
    value += b * v_b + h * v_h + first.to(tl.int64) * v_l
    k = _tile(key, k_l, k_d, row_keep, 0, D, BLOCK_D, dtype)
    grad_k, grad_v = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    kinds = tl.arange(0, KINDS)
    of_left, of_right = tl.zeros((BLOCK_M, KINDS), tl.float32), tl.zeros((BLOCK_M, KINDS), tl.float32)
    if TILES:
        v = _tile(value, v_l, v_d, row_keep, 0, DV, BLOCK_V, dtype)
        query += b * q_b + h * q_h + begin.to(tl.int64) * q_l
        grad += b * g_b + h * g_h + begin.to(tl.int64) * g_l
        last = tl.minimum(first + BLOCK_M, end) - 1
        if RASTER:
            before, behind = _row_factors(sums, rows, first, last, end, length, True)
        for start in range(begin, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            keep = _tokens_to_read(mask, columns, end, MASKED)
            q = _tile(query, q_l, q_d, keep, 0, D, BLOCK_D, dtype)
            g = _tile(grad, g_l, g_d, keep, 0, DV, BLOCK_V, dtype)
            scores = _dot(k, tl.trans(q))
            grad_weights = _dot(v, tl.trans(g))
            if DROPOUT:
                kept = _kept(seed, dropout, row, columns[None, :], rows[:, None], length)
                grad_weights *= kept
            weight = tl.zeros((BLOCK_N,), tl.float32) + scale
            if NORMALIZE:
                grad_weights += tl.load(delta + row * length + columns, mask=columns < end, other=0.0)[None, :]
                weight /= tl.load(divisor + row * length + columns, mask=columns < end, other=1.0)
            scores *= weight[None, :]
            if RASTER:
                decay = _block_mask(sums, rows, columns, before, behind, first, last, start, end, length, True)
                scores *= decay
                pairs = scores * grad_weights
                of_right, of_left = _raster_pairs(pairs, rows, columns, first, last, start, of_right, of_left)
                grad_weights *= decay
            elif ORDERS > 0:
                decay, of_right, of_left = _order_pairs(
                    scores * grad_weights, sums, places, rows, columns, end, length, of_right, of_left, ORDERS, True
                )
                scores *= decay
                grad_weights *= decay
            grad_weights *= weight[None, :]
            if DROPOUT:
                scores *= kept
            grad_v = _dot(_narrow(scores, dtype), g, grad_v)
            grad_k = _dot(_narrow(grad_weights, dtype), q, grad_k)
            query += BLOCK_N * q_l
            grad += BLOCK_N * g_l
    if STATES:
        totals += (b * sums_b + h * sums_h) // length * tl.cdiv(length, chunk)
        left, right = _state_factors(sums, totals, rows, n, end, length, chunk, RASTER, True)
        states += row * states_h + n.to(tl.int64) * states_n
        grad_v, _ = _read_states(
            key, k_l, k_d, row_keep, states, states_side, left, right, grad_v, of_left, dtype, D, DV, BLOCK_S, SIDES, False
        )
        grad_k, of_left, of_right = _read_states_back(
            value, v_l, v_d, row_keep, states, states_side, left, right, 1.0, k, grad_k, of_left, of_right, dtype,
            D, DV, BLOCK_S, SIDES, NORMALIZE,
        )  # fmt: skip
    if MASKED:  # the divisor's part would else reach padding
        grad_k = tl.where(row_keep[:, None], grad_k, 0.0)
    grad_key += b * r_b + h * r_h + first.to(tl.int64) * r_l
    grad_value += b * t_b + h * t_h + first.to(tl.int64) * t_l
    _store_tile(grad_key, r_l, r_d, rows < end, grad_k, D)
    _store_tile(grad_value, t_l, t_d, rows < end, grad_v, DV)
    if ORDERS > 0:
        at = grad_sums + row * (2 * ORDERS) * length + (2 * kinds * length)[None, :] + rows[:, None]
        inside = (rows < end)[:, None] & (kinds < ORDERS)[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) - of_left, mask=inside)
        tl.store(at + length, tl.load(at + length, mask=inside, other=0.0) - of_right, mask=inside)
