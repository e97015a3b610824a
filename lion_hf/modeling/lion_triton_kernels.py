"""The GPU kernels that are made of matrix products; lion_triton_launch.py launches them.

See lion_triton_parts.py for the mathematics and the names.
"""

from .lion_triton_parts import (
    RUNTIME,
    dot,
    load_tile,
    mask_of_block,
    mask_of_order,
    narrow,
    place_of_program,
    read_states,
    read_states_back,
    row_factors,
    state_factors,
    store_tile,
    tl,
    tokens_to_read,
    triton,
)


@triton.jit(do_not_specialize=RUNTIME)
def write_states_kernel(
    x, y, states, sums, totals, mask, divisor, delta,
    x_b, x_h, x_l, x_d, y_b, y_h, y_l, y_d,
    sums_b, sums_h, states_h, states_side, states_n, scale, heads, length, chunk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the states of both directions, in one read of x and y.

    That is sum_j factor_j x_j y_j. In the forward pass x and y are key and value. In the backward
    pass they are query and gradient, for the gradients of the states; the factors are then those of
    reading, times scale / divisor. Behind a state's D * DV numbers come the D of its divisor.
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
        keep = tokens_to_read(mask, tokens, end, MASKED)
        xs = load_tile(x, x_l, x_d, keep, d, D, BLOCK_D, dtype)
        ys = load_tile(y, y_l, y_d, keep, v, DV, BLOCK_V, dtype)
        to_left, to_right = state_factors(
            sums, totals, tokens, n, end, length, chunk, DECAY, not BACKWARD
        )
        if BACKWARD:
            weight = scale
            if NORMALIZE:
                weight = scale / tl.load(
                    divisor + row * length + tokens, mask=tokens < end, other=1.0
                )
            to_left, to_right = to_left * weight, to_right * weight
        left = dot(tl.trans(xs), narrow(ys * to_left[:, None], dtype), left)
        if DECAY:
            right = dot(tl.trans(xs), narrow(ys * to_right[:, None], dtype), right)
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
    """Adds sums over the columns before their row to `before`, over those behind it to `behind`.

    Neither gets the diagonal, which no decay reaches: beside gates near 0 it is a million times as
    large as all others.
    """
    before += tl.sum(tl.where(columns[None, :] < rows[:, None], pairs, 0.0), 1)[:, None]
    behind += tl.sum(tl.where(columns[None, :] > rows[:, None], pairs, 0.0), 1)[:, None]
    return before, behind


@triton.jit
def _raster_pairs(pairs, rows, columns, first, last, start, before, behind):
    """As `_split_pairs` for tokens that are read as they stand: most blocks are on one side."""
    if start + columns.shape[0] <= first:
        before += tl.sum(pairs, 1)[:, None]
    elif start > last:
        behind += tl.sum(pairs, 1)[:, None]
    else:
        before, behind = _split_pairs(pairs, rows, columns, before, behind)
    return before, behind


@triton.jit
def _order_pairs(
    pairs, sums, places, rows, columns, end, length, before, behind,
    ORDERS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """As `_split_pairs` for several orders, each in a column of its own, and the sum of the masks.

    The pairs come without a mask.
    """
    total = tl.zeros(pairs.shape, tl.float32)
    for i in tl.static_range(ORDERS):
        order_mask = mask_of_order(sums + i * 4 * length, rows, columns, end, length, SOURCES)
        total += order_mask
        row_places = tl.load(places + i * length + rows, mask=rows < end, other=0)
        column_places = tl.load(places + i * length + columns, mask=columns < end, other=0)
        left, right = _split_pairs(pairs * order_mask, row_places, column_places, 0.0, 0.0)
        this = (tl.arange(0, before.shape[1]) == i)[None, :]
        before, behind = before + tl.where(this, left, 0.0), behind + tl.where(this, right, 0.0)
    return total, before, behind


@triton.jit
def _kept(seed, dropout, row, targets, sources, length):
    """1 / (1 - dropout) for scores that are kept, else 0.

    Drawn by Philox-7 (Salmon et al., 2011), which every pass repeats.
    """
    uniform = tl.rand(tl.load(seed) + row, targets * length + sources, n_rounds=7)
    return tl.where(uniform < dropout, 0.0, 1 / (1 - dropout))


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    query, key, value, output, divisor, states, sums, mask,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, o_b, o_h, o_l, o_d,
    sums_b, sums_h, states_h, states_side, states_n,
    scale, eps, heads, length, chunk, seed, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, ORDERS: tl.constexpr,
    RASTER: tl.constexpr, TILES: tl.constexpr, STATES: tl.constexpr, SIDES: tl.constexpr,
    NORMALIZE: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Outputs of one block of targets.

    Sources of the same chunk come block by block (TILES), the others through states.
    """
    row, b, h, n, begin, first, end = place_of_program(length, chunk, heads, BLOCK_M)
    if first >= end:
        return
    dtype: tl.constexpr = value.dtype.element_ty
    mask += b * length
    sums += b * sums_b + h * sums_h
    query += b * q_b + h * q_h + first.to(tl.int64) * q_l
    rows = first + tl.arange(0, BLOCK_M)
    row_keep = tokens_to_read(mask, rows, end, MASKED)
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    if TILES:
        key += b * k_b + h * k_h + begin.to(tl.int64) * k_l
        value += b * v_b + h * v_h + begin.to(tl.int64) * v_l
        q = load_tile(query, q_l, q_d, row_keep, 0, D, BLOCK_D, dtype)
        last = tl.minimum(first + BLOCK_M, end) - 1
        if RASTER:
            before, behind = row_factors(sums, rows, first, last, end, length, False)
        for start in range(begin, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            keep = tokens_to_read(mask, columns, end, MASKED)
            k = load_tile(key, k_l, k_d, keep, 0, D, BLOCK_D, dtype)
            v = load_tile(value, v_l, v_d, keep, 0, DV, BLOCK_V, dtype)
            weights = dot(q, tl.trans(k)) * scale
            if RASTER:
                weights *= mask_of_block(
                    sums, rows, columns, before, behind, first, last, start, end, length, False
                )
            elif ORDERS > 0:
                decay = mask_of_order(sums, rows, columns, end, length, False)
                for i in tl.static_range(1, ORDERS):
                    decay += mask_of_order(sums + i * 4 * length, rows, columns, end, length, False)
                weights *= decay
            if NORMALIZE:
                norm += tl.sum(weights, 1)
            if DROPOUT:
                weights *= _kept(seed, dropout, row, rows[:, None], columns[None, :], length)
            total = dot(narrow(weights, dtype), v, total)
            key += BLOCK_N * k_l
            value += BLOCK_N * v_l
    if STATES:
        left, right = state_factors(sums, sums, rows, n, end, length, chunk, RASTER, False)
        states += row * states_h + n.to(tl.int64) * states_n
        total, norm = read_states(
            query, q_l, q_d, row_keep, states, states_side, left * scale, right * scale, total,
            norm, dtype, D, DV, BLOCK_S, SIDES, NORMALIZE,
        )  # fmt: skip
    if NORMALIZE:
        norm += eps
        tl.store(divisor + row * length + rows, norm, mask=rows < end)
        total /= norm[:, None]
    output += b * o_b + h * o_h + first.to(tl.int64) * o_l
    store_tile(output, o_l, o_d, rows < end, total, DV)


@triton.jit(do_not_specialize=RUNTIME)
def grad_query_kernel(
    grad, query, key, value, output, divisor, delta, grad_query, grad_sums,
    states, sums, places, mask,
    g_b, g_h, g_l, g_d, q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d,
    o_b, o_h, o_l, o_d, r_b, r_h, r_l, r_d,
    sums_b, sums_h, states_h, states_side, states_n, scale, heads, length, chunk, seed, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, ORDERS: tl.constexpr,
    RASTER: tl.constexpr, TILES: tl.constexpr, KINDS: tl.constexpr, STATES: tl.constexpr,
    SIDES: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of targets: query, and F and B as far as targets receive by them.

    With delta_i = -g_i . y_i, the divisor's part, and pairs
    X_ij = M_ij (q_i . k_j) (g_i . v_j + delta_i), F_i gets
    sum_(j < i) X_ij + 2 ** F_i q_i . (S g_i + delta_i z), and B_i the same from the other side; all
    times scale / divisor_i.
    """
    row, b, h, n, begin, first, end = place_of_program(length, chunk, heads, BLOCK_M)
    if first >= end:
        return
    dtype: tl.constexpr = value.dtype.element_ty
    mask += b * length
    sums += b * sums_b + h * sums_h
    rows = first + tl.arange(0, BLOCK_M)
    row_keep = tokens_to_read(mask, rows, end, MASKED)
    grad += b * g_b + h * g_h + first.to(tl.int64) * g_l
    query += b * q_b + h * q_h + first.to(tl.int64) * q_l
    q = load_tile(query, q_l, q_d, row_keep, 0, D, BLOCK_D, dtype)
    g = load_tile(grad, g_l, g_d, row_keep, 0, DV, BLOCK_V, dtype)
    change = tl.zeros((BLOCK_M,), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32) + scale
    if NORMALIZE:
        output += b * o_b + h * o_h + first.to(tl.int64) * o_l
        y = load_tile(output, o_l, o_d, row_keep, 0, DV, BLOCK_V, tl.float32)
        change = -tl.sum(g * y, 1)
        weight /= tl.load(divisor + row * length + rows, mask=rows < end, other=1.0)
        tl.store(delta + row * length + rows, change, mask=rows < end)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    kinds = tl.arange(0, KINDS)
    of_left = tl.zeros((BLOCK_M, KINDS), tl.float32)
    of_right = tl.zeros((BLOCK_M, KINDS), tl.float32)
    if TILES:
        key += b * k_b + h * k_h + begin.to(tl.int64) * k_l
        value += b * v_b + h * v_h + begin.to(tl.int64) * v_l
        last = tl.minimum(first + BLOCK_M, end) - 1
        if RASTER:
            before, behind = row_factors(sums, rows, first, last, end, length, False)
        for start in range(begin, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            keep = tokens_to_read(mask, columns, end, MASKED)
            k = load_tile(key, k_l, k_d, keep, 0, D, BLOCK_D, dtype)
            v = load_tile(value, v_l, v_d, keep, 0, DV, BLOCK_V, dtype)
            grad_weights = dot(g, tl.trans(v))
            if DROPOUT:
                grad_weights *= _kept(seed, dropout, row, rows[:, None], columns[None, :], length)
            grad_weights += change[:, None]
            if RASTER:
                grad_weights *= mask_of_block(
                    sums, rows, columns, before, behind, first, last, start, end, length, False
                )
                pairs = dot(q, tl.trans(k)) * grad_weights
                of_left, of_right = _raster_pairs(
                    pairs, rows, columns, first, last, start, of_left, of_right
                )
            elif ORDERS > 0:
                pairs = dot(q, tl.trans(k)) * grad_weights
                decay, of_left, of_right = _order_pairs(
                    pairs, sums, places, rows, columns, end, length, of_left, of_right,
                    ORDERS, False,
                )  # fmt: skip
                grad_weights *= decay
            result = dot(narrow(grad_weights, dtype), k, result)
            key += BLOCK_N * k_l
            value += BLOCK_N * v_l
    if STATES:
        left, right = state_factors(sums, sums, rows, n, end, length, chunk, RASTER, False)
        states += row * states_h + n.to(tl.int64) * states_n
        result, of_left, of_right = read_states_back(
            grad, g_l, g_d, row_keep, states, states_side, left, right, change, q, result,
            of_left, of_right, dtype, D, DV, BLOCK_S, SIDES, NORMALIZE,
        )  # fmt: skip
    grad_query += b * r_b + h * r_h + first.to(tl.int64) * r_l
    store_tile(grad_query, r_l, r_d, rows < end, result * weight[:, None], D)
    if ORDERS > 0:
        places = (
            grad_sums + row * (2 * ORDERS) * length + (2 * kinds * length)[None, :] + rows[:, None]
        )
        inside = (rows < end)[:, None] & (kinds < ORDERS)[None, :]
        tl.store(places, of_left * weight[:, None], mask=inside)
        tl.store(places + length, of_right * weight[:, None], mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def grad_key_value_kernel(
    grad, query, key, value, divisor, delta, grad_key, grad_value, grad_sums,
    states, sums, totals, places, mask,
    g_b, g_h, g_l, g_d, q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d,
    r_b, r_h, r_l, r_d, t_b, t_h, t_l, t_d,
    sums_b, sums_h, states_h, states_side, states_n, scale, heads, length, chunk, seed, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, ORDERS: tl.constexpr,
    RASTER: tl.constexpr, TILES: tl.constexpr, KINDS: tl.constexpr, STATES: tl.constexpr,
    SIDES: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of sources: key and value, and F and B as far as they send.

    The mirror image of grad_query_kernel: blocks are (sources, targets), and the states are U and
    W, the gradients of S and T, to which chunks behind and before have added. From F_j is taken
    sum_(i > j) X_ij + 2 ** (F_end - F_j) k_j . (U v_j + z).
    """
    row, b, h, n, begin, first, end = place_of_program(length, chunk, heads, BLOCK_M)
    if first >= end:
        return
    dtype: tl.constexpr = value.dtype.element_ty
    mask += b * length
    sums += b * sums_b + h * sums_h
    rows = first + tl.arange(0, BLOCK_M)
    row_keep = tokens_to_read(mask, rows, end, MASKED)
    key += b * k_b + h * k_h + first.to(tl.int64) * k_l
    value += b * v_b + h * v_h + first.to(tl.int64) * v_l
    k = load_tile(key, k_l, k_d, row_keep, 0, D, BLOCK_D, dtype)
    grad_k = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    kinds = tl.arange(0, KINDS)
    of_left = tl.zeros((BLOCK_M, KINDS), tl.float32)
    of_right = tl.zeros((BLOCK_M, KINDS), tl.float32)
    if TILES:
        v = load_tile(value, v_l, v_d, row_keep, 0, DV, BLOCK_V, dtype)
        query += b * q_b + h * q_h + begin.to(tl.int64) * q_l
        grad += b * g_b + h * g_h + begin.to(tl.int64) * g_l
        last = tl.minimum(first + BLOCK_M, end) - 1
        if RASTER:
            before, behind = row_factors(sums, rows, first, last, end, length, True)
        for start in range(begin, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            keep = tokens_to_read(mask, columns, end, MASKED)
            q = load_tile(query, q_l, q_d, keep, 0, D, BLOCK_D, dtype)
            g = load_tile(grad, g_l, g_d, keep, 0, DV, BLOCK_V, dtype)
            scores = dot(k, tl.trans(q))
            grad_weights = dot(v, tl.trans(g))
            if DROPOUT:
                kept = _kept(seed, dropout, row, columns[None, :], rows[:, None], length)
                grad_weights *= kept
            weight = tl.zeros((BLOCK_N,), tl.float32) + scale
            if NORMALIZE:
                grad_weights += tl.load(
                    delta + row * length + columns, mask=columns < end, other=0.0
                )[None, :]
                weight /= tl.load(divisor + row * length + columns, mask=columns < end, other=1.0)
            scores *= weight[None, :]
            if RASTER:
                decay = mask_of_block(
                    sums, rows, columns, before, behind, first, last, start, end, length, True
                )
                scores *= decay
                pairs = scores * grad_weights
                of_right, of_left = _raster_pairs(
                    pairs, rows, columns, first, last, start, of_right, of_left
                )
                grad_weights *= decay
            elif ORDERS > 0:
                decay, of_right, of_left = _order_pairs(
                    scores * grad_weights, sums, places, rows, columns, end, length,
                    of_right, of_left, ORDERS, True,
                )  # fmt: skip
                scores *= decay
                grad_weights *= decay
            grad_weights *= weight[None, :]
            if DROPOUT:
                scores *= kept
            grad_v = dot(narrow(scores, dtype), g, grad_v)
            grad_k = dot(narrow(grad_weights, dtype), q, grad_k)
            query += BLOCK_N * q_l
            grad += BLOCK_N * g_l
    if STATES:
        totals += (b * sums_b + h * sums_h) // length * tl.cdiv(length, chunk)
        left, right = state_factors(sums, totals, rows, n, end, length, chunk, RASTER, True)
        states += row * states_h + n.to(tl.int64) * states_n
        grad_v, _ = read_states(
            key, k_l, k_d, row_keep, states, states_side, left, right, grad_v, of_left,
            dtype, D, DV, BLOCK_S, SIDES, False,
        )  # fmt: skip
        grad_k, of_left, of_right = read_states_back(
            value, v_l, v_d, row_keep, states, states_side, left, right, 1.0, k, grad_k,
            of_left, of_right, dtype, D, DV, BLOCK_S, SIDES, NORMALIZE,
        )  # fmt: skip
    if MASKED:  # the divisor's part would else reach padding
        grad_k = tl.where(row_keep[:, None], grad_k, 0.0)
    grad_key += b * r_b + h * r_h + first.to(tl.int64) * r_l
    grad_value += b * t_b + h * t_h + first.to(tl.int64) * t_l
    store_tile(grad_key, r_l, r_d, rows < end, grad_k, D)
    store_tile(grad_value, t_l, t_d, rows < end, grad_v, DV)
    if ORDERS > 0:
        at = grad_sums + row * (2 * ORDERS) * length + (2 * kinds * length)[None, :] + rows[:, None]
        inside = (rows < end)[:, None] & (kinds < ORDERS)[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) - of_left, mask=inside)
        tl.store(at + length, tl.load(at + length, mask=inside, other=0.0) - of_right, mask=inside)
