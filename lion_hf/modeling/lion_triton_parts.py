"""The parts that the GPU kernels share, and their mathematics; lion_triton_launch.py launches them.

A row is cut into chunks. With F_i the log-decay (to base 2) from a chunk's first token to its token
i, read left to right, and B_i the one from the token behind the chunk to i, read right to left,

    M_ij = 2 ** min(F_i - F_j, B_i - B_j)       within a chunk, for tokens in any order
         = 2 ** (F_i - F_r) * 2 ** (F_r - F_j)  for r between them and j before i: a block beside
                                                the diagonal needs two vectors
    y_i  = sum_j M_ij (q_i . k_j) v_j + 2 ** F_i q_i . S + 2 ** B_i q_i . T

(see lion_chunkwise.py), where S and T are what the chunks before and behind have left. Swapping
sources and targets gives the gradients. No exponent is above 0. Sums are two float32 numbers, a
high and a low part, whose differences are as exact as those of float64.

In every kernel axis 0 of the grid counts all blocks of all heads, because the other axes end at
65,535. A block's address is computed in 64 bits and the places inside it in 32. `_l`, `_d`, `_h`
and `_b` behind a tensor's letter are its strides along length, head size, heads and batch. D and DV
are the head sizes, BLOCK_D and BLOCK_V powers of two that hold them.
"""

import os

try:
    import triton
    from triton import language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; the torch forms do not") from error

# The log-decay of a target that does not exist: its exponents are far below those of every float32.
FAR = tl.constexpr(-1e30)
# Products of float32: three of tf32, with an error of 1e-6; tf32 alone leaves 5e-4. Half types do
# not read this.
PRECISION = tl.constexpr("tf32x3")
# The interpreter takes a bfloat16 operand of a product for an integer, so it gets them as float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Sizes that change from call to call: one compiled kernel serves all of them. Strides of tensors
# with heads as rows are not among them: whether 16 divides them decides how wide the loads are.
RUNTIME = ["batch", "heads", "length", "chunk", "elements", "scale", "eps", "dropout"]
RUNTIME += ["sums_b", "sums_h", "ltr_k", "ltr_b", "ltr_h", "rtl_k", "rtl_b", "rtl_h"]


@triton.jit
def dot(a, b, total=None):
    """total + a @ b in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in another type; float16 saturates instead of overflowing."""
    if dtype == tl.float16:
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def load_tile(
    base,
    row_stride,
    column_stride,
    keep,
    column,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Rows of a matrix from `column` on, (rows, COLUMNS).

    They are zero where a row is not kept, and behind the matrix's last column.
    """
    rows, columns = tl.arange(0, keep.shape[0]), column + tl.arange(0, COLUMNS)
    inside = keep[:, None]
    if WIDTH % COLUMNS != 0:
        inside = inside & (columns < WIDTH)[None, :]
    x = tl.load(
        base + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0
    )
    return x if x.dtype == dtype else narrow(x, dtype)


@triton.jit
def store_tile(base, row_stride, column_stride, keep, x, WIDTH: tl.constexpr):
    rows, columns = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    inside = keep[:, None]
    if x.shape[1] != WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    places = base + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(places, narrow(x, base.dtype.element_ty), mask=inside)


@triton.jit
def place_of_program(length, chunk, heads, BLOCK: tl.constexpr):
    """The head of a program and its place in the row.

    Returns the head as one number and as (batch, head), the number of the chunk, and where the
    chunk begins, the block begins and the chunk ends.
    """
    blocks, count = tl.cdiv(chunk, BLOCK), tl.cdiv(length, chunk)
    program = tl.program_id(0)
    n = program // blocks % count
    row = (program // (blocks * count)).to(tl.int64)
    begin = n * chunk
    end = tl.minimum(begin + chunk, length)
    return row, row // heads, row % heads, n, begin, begin + program % blocks * BLOCK, end


@triton.jit
def tokens_to_read(mask, tokens, end, MASKED: tl.constexpr):
    """Which tokens are in the chunk and are not padding."""
    keep = tokens < end
    if MASKED:
        keep = tl.load(mask + tokens, mask=keep, other=0) != 0
    return keep


@triton.jit
def load_sums(base, tokens, end, length, SOURCES: tl.constexpr):
    """High and low parts of F or B.

    Where there is no token they make a source's exponents at most 0 and a target's -inf.
    """
    keep = tokens < end
    high = tl.load(base + tokens, mask=keep, other=0.0 if SOURCES else FAR)
    return high, tl.load(base + length + tokens, mask=keep, other=0.0)


@triton.jit
def edge_factor(base, tokens, reference, end, length, SOURCES: tl.constexpr):
    """Decay between tokens and a token between them and the other block.

    It is one of the two vectors of a block of the mask.
    """
    high, low = load_sums(base, tokens, end, length, SOURCES)
    exponent = (high - tl.load(base + reference)) + (low - tl.load(base + length + reference))
    return tl.exp2(-exponent if SOURCES else exponent)


@triton.jit
def row_factors(sums, rows, first, last, end, length, SOURCES: tl.constexpr):
    """The rows' vectors for the blocks of columns before them and behind them."""
    before = edge_factor(sums + 2 * length if SOURCES else sums, rows, first, end, length, SOURCES)
    behind = edge_factor(sums if SOURCES else sums + 2 * length, rows, last, end, length, SOURCES)
    return before, behind


@triton.jit
def mask_of_order(sums, rows, columns, end, length, SOURCES: tl.constexpr):
    """The mask of one order between any two blocks, exact to float32.

    With SOURCES the rows are the sources, else the targets.
    """
    row_high, row_low = load_sums(sums, rows, end, length, SOURCES)
    column_high, column_low = load_sums(sums, columns, end, length, not SOURCES)
    left = (row_high[:, None] - column_high[None, :]) + (row_low[:, None] - column_low[None, :])
    row_high, row_low = load_sums(sums + 2 * length, rows, end, length, SOURCES)
    column_high, column_low = load_sums(sums + 2 * length, columns, end, length, not SOURCES)
    right = (row_high[:, None] - column_high[None, :]) + (row_low[:, None] - column_low[None, :])
    return tl.exp2(-tl.maximum(left, right) if SOURCES else tl.minimum(left, right))


@triton.jit
def mask_of_block(
    sums, rows, columns, before, behind, first, last, start, end, length, SOURCES: tl.constexpr
):
    """The mask of the order that reads the tokens as they stand.

    It is made of two vectors, except for blocks on the diagonal.
    """
    left, right = sums, sums + 2 * length
    if start + columns.shape[0] <= first:
        mask = (
            before[:, None]
            * edge_factor(right if SOURCES else left, columns, first, end, length, not SOURCES)[
                None, :
            ]
        )
    elif start > last:
        mask = (
            behind[:, None]
            * edge_factor(left if SOURCES else right, columns, last, end, length, not SOURCES)[
                None, :
            ]
        )
    else:
        mask = mask_of_order(sums, rows, columns, end, length, SOURCES)
    return mask


@triton.jit
def state_factors(
    sums, totals, tokens, n, end, length, chunk, DECAY: tl.constexpr, WRITE: tl.constexpr
):
    """Decays between the chunk's edges and its tokens.

    From the left and the right edge to tokens that read a state, or to the other edge from tokens
    that WRITE one.
    """
    left = tl.full(tokens.shape, 1.0, tl.float32)
    right = left
    if DECAY:
        left_high, left_low = load_sums(sums, tokens, end, length, WRITE)
        right_high, right_low = load_sums(sums + 2 * length, tokens, end, length, WRITE)
        if WRITE:  # the whole chunk's decay less that up to the token
            count = tl.cdiv(length, chunk)
            totals += n
            left_high, left_low = tl.load(totals) - left_high, tl.load(totals + count) - left_low
            right_high = tl.load(totals + 2 * count) - right_high
            right_low = tl.load(totals + 3 * count) - right_low
        left, right = tl.exp2(left_high + left_low), tl.exp2(right_high + right_low)
    return left, right


@triton.jit
def state_product(
    x,
    state,
    factor,
    rows,
    columns,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """factor * (x @ state); the state's float32 numbers may leave the range of x's type."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    state = tl.load(
        state + rows[:, None] * row_stride + columns[None, :] * column_stride,
        mask=inside,
        other=0.0,
    )
    unit = 1.0
    if x.dtype == tl.float16:
        unit = tl.maximum(tl.max(tl.max(tl.abs(state), 1), 0) / 32768.0, 1.0)
    return dot(x, (state / unit).to(x.dtype)) * (factor * unit)[:, None]


@triton.jit
def read_states(
    base, row_stride, column_stride, keep, state, states_side, left, right, total, norm,
    dtype: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr,
    SIDES: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Adds to total and norm what tokens read from the states of both directions.

    The tokens are (rows, D), the states (D, DV) and, for the divisor, (D).
    """
    columns = tl.arange(0, total.shape[1])
    for d in range(0, D, BLOCK_S):
        x = load_tile(base, row_stride, column_stride, keep, d, D, BLOCK_S, dtype)
        dims = d + tl.arange(0, BLOCK_S)
        for side in tl.static_range(SIDES):
            place, factor = state + side * states_side, left if side == 0 else right
            total += state_product(x, place, factor, dims, columns, DV, 1, D, DV)
            if NORMALIZE:
                z = tl.load(place + D * DV + dims, mask=dims < D, other=0.0)
                norm += tl.sum(x * z[None, :], 1) * factor
    return total, norm


@triton.jit
def read_states_back(
    base, row_stride, column_stride, keep, state, states_side, left, right, change, own, total,
    of_left, of_right, dtype: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_S: tl.constexpr, SIDES: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """As `read_states`, for tokens (rows, DV), whose divisor weighs `change`.

    of_left and of_right get what `own` receives.
    """
    dims = tl.arange(0, total.shape[1])
    for side in tl.static_range(SIDES):
        place, factor = state + side * states_side, left if side == 0 else right
        received = tl.zeros(total.shape, tl.float32)
        if NORMALIZE:
            z = tl.load(place + D * DV + dims, mask=dims < D, other=0.0)
            received += (factor * change)[:, None] * z[None, :]
        for d in range(0, DV, BLOCK_S):
            x = load_tile(base, row_stride, column_stride, keep, d, DV, BLOCK_S, dtype)
            received += state_product(
                x, place, factor, d + tl.arange(0, BLOCK_S), dims, 1, DV, DV, D
            )
        total += received
        if side == 0:
            of_left += tl.sum(own * received, 1)[:, None]
        else:
            of_right += tl.sum(own * received, 1)[:, None]
    return total, of_left, of_right
