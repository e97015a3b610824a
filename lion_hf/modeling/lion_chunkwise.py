"""The chunk form: attention inside a chunk, states between chunks, linear in length.

With chunk-local exclusive prefix sums F of `left_to_right` and R of `right_to_left`, and their sums
F_end and R_end over a chunk's edges (the one to the next chunk included), a token i receives

    from its own chunk      sum_j M_ij (q_i . k_j) v_j     M_ij = exp(min(F_i - F_j, R_j - R_i))
    from the chunks before  exp(F_i) q_i . S               S <- exp(F_end) S
                                                                + sum_j exp(F_end - F_j) k_j v_j
    from the chunks behind  exp(R_end - R_i) q_i . T       T <- exp(R_end) T
                                                                + sum_j exp(R_j) k_j v_j

(arXiv 2502.16249, section 3.3, made linear). Every exponent is at most 0. Of the two differences in
M_ij the one of the direction in which j comes before i is at most 0 and the other at least 0, so
the minimum needs no triangle, and it holds for tokens in any order: one chunk serves several
reading orders with one matrix of scores.

Both passes work through a chunk of a few heads at a time, whose intermediates stay in the
processor's cache. For the backward pass the inputs are kept and the states at the edges between
chunks, 2 D / chunk size times the values; the rest is computed again. The two passes are operators
of torch.library, which torch.compile and torch.export take as they are for any length; their loops
would otherwise be unrolled.
"""

import torch

from .lion_chunk_parts import (
    Block,
    ChunkInputs,
    Decays,
    Scratch,
    add_product,
    edge_gradients,
    row_blocks,
)
from .lion_numerics import (
    compute_type,
    full_precision,
    gradients_again,
    needs_grad,
)
from .lion_portable import chunks_at_once, needs_plain_operations
from .lion_request import Directions, along_orders

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def chunkwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor | None,
    right_to_left: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """The chunk form of the operation.

    Args:
        query: (B, H, L, D), of any strides and floating-point type.
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        left_to_right: log-decays, finite, (B or 1, H or 1, L or 1), or None for no decay.
        right_to_left: log-decays, likewise.
        scale: factor of the scores.
        chunk_size: tokens per chunk, None for that of `CHUNK_SIZES`; the last chunk may be shorter.
            Without decay there are no chunks.
        order: (K, L) or (K, B, L), reading orders of rows that fit into one chunk. The decays then
            have a leading dimension K and are in reading order; the mask is the mean of the masks
            along each order. Not where `needs_plain_operations`.

    Returns:
        (B, H, L, Dv) in float32, or in float64 if `value` is.
    """
    if left_to_right is None or right_to_left is None or 0 in (*query.shape, *value.shape):
        dtype = compute_type(value)
        # one state serves every token
        return query.to(dtype) @ (key.to(dtype).mT @ value.to(dtype)).mul(scale)
    tensors = query, key, value, left_to_right, right_to_left
    if needs_plain_operations(*tensors):
        return chunks_at_once(*tensors, scale, chunk_size)
    if order is None:
        tensors = *tensors[:3], left_to_right[None], right_to_left[None]
    # Exported programs serve any number of chunks, so they do not keep their states.
    keep_states = needs_grad(*tensors) and not torch.compiler.is_exporting()
    inputs = ChunkInputs(*tensors, order, scale, chunk_size)
    # Where nothing is recorded, compiled, exported or only pretended (fake tensors), an operator
    # would only cost time.
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if keep_states or tracing or not all(type(x) in PLAIN_TYPES for x in tensors):
        return chunkwise_forward(*inputs, keep_states)[0]
    return _forward(inputs, keep_states)[0]


@torch.library.custom_op("lion_hf::chunkwise", mutates_args=())
def chunkwise_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor,
    right_to_left: torch.Tensor,
    order: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunkwise` with decays (K, B or 1, H or 1, L or 1).

    Returns:
        The output, and with `keep_states` the states S and T at the edges between chunks,
        (2, N - 1, B, H, D, Dv), for the backward pass.
    """
    inputs = query, key, value, left_to_right, right_to_left, order, scale, chunk_size
    return _forward(ChunkInputs(*inputs), keep_states)


@chunkwise_forward.register_fake
def _(query, key, value, left_to_right, right_to_left, order, scale, chunk_size, keep_states):
    inputs = query, key, value, left_to_right, right_to_left, order, scale, chunk_size
    return _empty_results(ChunkInputs(*inputs), keep_states)


def _empty_results(inputs: ChunkInputs, keep_states: bool) -> tuple[torch.Tensor, torch.Tensor]:
    query, value = inputs.query, inputs.value
    dtype, shape = compute_type(value), (0,)
    if keep_states:
        edges = -(-query.shape[2] // inputs.tokens_per_chunk()) - 1
        shape = 2, edges, *query.shape[:2], query.shape[-1], value.shape[-1]
    return torch.empty_like(value, dtype=dtype), query.new_empty(shape, dtype=dtype)


def _forward(inputs: ChunkInputs, keep_states: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What `chunkwise_forward` returns."""
    chunk_size, dtype = inputs.tokens_per_chunk(), compute_type(inputs.value)
    result, states = _empty_results(inputs, keep_states)
    with full_precision(inputs.value):
        decays, scratch = Decays(inputs, chunk_size, dtype), Scratch(inputs.query, dtype)
        for rows in row_blocks(inputs.query, chunk_size):
            block = Block(inputs, decays, scratch, rows)
            kept = states[:, :, rows] if keep_states else None
            _forward_block(block, block.chunks(result), kept)
    return result, states


def _forward_block(
    block: Block, result: tuple[torch.Tensor, ...], states: torch.Tensor | None
) -> None:
    """Writes the outputs of some rows, and their states (2, N - 1, rows, H, D, Dv) if wanted."""
    count, empty, scratch = block.count, block.no_state, block.scratch
    # 1. right to left: what the chunks behind each chunk left in T
    rights = _states_from_the_right(block, states)
    left = empty
    for n in range(count):
        q, k, v = block.read(n, block.query, block.key, block.value)
        size = q.shape[2]
        # 2. inside the chunk
        mask, _ = block.masks(n, size)
        scores = scratch.product("spare", q, k.mT)
        output = scratch.product("output", scores.mul_(mask), v)
        if count > 1:
            # 3. from the chunks before and from the chunks behind
            add_product(output, scratch.scaled(q, block.factor("read_left", n, size)), left)
            right = rights[n] if n + 1 < count else empty
            add_product(output, scratch.scaled(q, block.factor("read_right", n, size)), right)
        if n + 1 < count:
            # 4. this chunk into S
            k = scratch.scaled(k, block.factor("write_left", n, size))
            out = None if states is None else states[0, n]
            left = block.pass_on("left", n, left, (k, v), out)
        result[n].copy_(output)


def _states_from_the_right(block: Block, states: torch.Tensor | None) -> torch.Tensor:
    """T at the edges between chunks, (N - 1, rows, H, D, Dv).

    In one piece, because small pieces of memory are not given back.
    """
    right = block.no_state
    rights = right.new_empty(block.count - 1, *right.shape) if states is None else states[1]
    for n in range(block.count - 1, 0, -1):
        k, v = block.read(n, block.key, block.value)
        k = block.scratch.scaled(k, block.factor("write_right", n, k.shape[2]))
        right = block.pass_on("right", n, right, (k, v), rights[n - 1])
    return rights


@torch.library.custom_op("lion_hf::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor,
    right_to_left: torch.Tensor,
    order: torch.Tensor | None,
    states: torch.Tensor,
    scale: float,
    chunk_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `chunkwise_forward` with respect to its five tensors.

    For the output's gradient g, (B, H, L, Dv). With U and W, the gradients with respect to the
    states S and T that a chunk leaves, and P_ij = M_ij q_i . k_j,

        dq_i = sum_j M_ij (g_i . v_j) k_j + exp(F_i) S g_i + exp(R_end - R_i) T g_i
        dk_j = sum_i M_ij (g_i . v_j) q_i + exp(F_end - F_j) U v_j + exp(R_j) W v_j
        dv_j = sum_i P_ij g_i + exp(F_end - F_j) U^T k_j + exp(R_j) W^T k_j
        dF_i = sum_(j before i) P_ij g_i . v_j - sum_(j after i) P_ji g_j . v_i
               + exp(F_i) q_i S g_i - exp(F_end - F_i) k_i U v_i

    with dF_end = <S, U> after the chunk; R likewise, mirrored. Gradients of the edges are sums of
    dF over all later places.
    """
    tensors = query, key, value, left_to_right, right_to_left, order
    return _gradients(ChunkInputs(*tensors, scale, chunk_size), grad, states)


def _gradients(
    inputs: ChunkInputs, grad: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `chunkwise_backward` returns."""
    query, key, value = inputs[:3]
    if states.dim() == 1:  # exported programs do not keep them
        states = _forward(inputs, True)[1]
    dtype, chunk_size = compute_type(value), inputs.tokens_per_chunk()
    grads = [torch.empty_like(x) for x in (query, key, value)]
    with full_precision(value):
        decays, scratch = Decays(inputs, chunk_size, dtype), Scratch(query, dtype)
        sums = decays.empty_gradients(inputs)
        for rows in row_blocks(query, chunk_size):
            block = Block(inputs, decays, scratch, rows)
            results = [block.chunks(x) for x in grads]
            _backward_block(
                block, block.chunks(grad), states[:, :, rows], results, sums[:, :, rows]
            )
    left, right = edge_gradients(sums, inputs)
    return grads[0], grads[1], grads[2], left, right


def _backward_block(
    block: Block,
    grad: tuple[torch.Tensor, ...],
    states: torch.Tensor,
    results: list[tuple[torch.Tensor, ...]],
    sums: torch.Tensor,
) -> None:
    """Writes the gradients of some rows.

    Args:
        block: the rows.
        grad: the chunks of the output's gradient.
        states: S and T at the edges between chunks, (2, N - 1, rows, H, D, Dv).
        results: the chunks of the gradients of query, key and value.
        sums: the gradients of F and R, (2, K, rows, H, N, C + 1).
    """
    count, empty, scratch = block.count, block.no_state, block.scratch
    left, right = states.unbind()
    states_left, states_right = [empty, *left, empty], [*right, empty]
    # 1. right to left: U
    grads_left = [empty]
    for n in range(count - 1, 0, -1):
        g, q = block.read(n, grad, block.query)
        q = scratch.scaled(q, block.factor("read_left", n, q.shape[2]))
        grads_left.append(block.pass_on("left", n, grads_left[-1], (q, g)))
    grad_right = empty
    for n in range(count):
        chunk = block.read(n, grad, block.query, block.key, block.value)
        # 2. inside the chunk
        found = backward_inside(block, n, chunk, sums[..., n, :])
        if count > 1:
            # 3. through the states
            grad_left = grads_left.pop()
            around = states_left[n], states_right[n], grad_left, grad_right
            _backward_through_states(block, n, chunk, around, found, sums[:, 0, :, :, n])
            # 4. this chunk into W
            g, q = chunk[:2]
            q = scratch.scaled(q, block.factor("read_right", n, q.shape[2]))
            grad_right = block.pass_on("right", n, grad_right, (q, g))
            sums[0, 0, :, :, n, -1] = (states_left[n + 1] * grad_left).sum((-1, -2))
            sums[1, 0, :, :, n, -1] = (grad_right * states_right[n]).sum((-1, -2))
        for result, x in zip(results, found):
            result[n].copy_(x)


def backward_inside(
    block: Block, n: int, chunk: list[torch.Tensor], sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value of a chunk, as far as they come from its own tokens.

    Args:
        block: the rows.
        n: number of the chunk.
        chunk: its gradient, query, key and value; the first and last may have more columns than
            the value, which count in their products alone.
        sums: the gradients of F and R, (2, K, rows, H, C + 1), which are written.
    """
    (g, q, k, v), scratch = chunk, block.scratch
    size, orders = g.shape[2], sums.shape[1]
    mask, masks = block.masks(n, size)
    scores = scratch.product("scores", q, k.mT)
    grad_weights = scratch.product("grad_weights", g, v.mT)
    weights = torch.mul(scores, mask, out=scratch("spare", *scores.shape))
    grad_v = scratch.product("grad_v", weights.mT, g[..., : block.value[n].shape[-1]])
    pairs = weights if orders == 1 else scores
    pairs.mul_(grad_weights)
    grad_weights.mul_(mask)
    grad_q = scratch.product("grad_q", grad_weights, k)
    grad_k = scratch.product("grad_k", grad_weights.mT, q)
    for i in range(orders):
        if orders > 1:
            pairs = torch.mul(scores, masks[i], out=weights).mul_(1 / orders)
        # a token has no edge to itself: its part would leave rounding
        pairs.diagonal(dim1=-2, dim2=-1).zero_()
        change = pairs.sum(-2) - pairs.sum(-1)
        places = block.places(i)
        if places is None:
            pairs.tril_(-1)
        else:
            pairs.mul_(places[..., None] > places[..., None, :])
        earlier = pairs.sum(-1) - pairs.sum(-2)
        for direction, x in enumerate((earlier, change.add_(earlier))):
            if places is None:
                sums[direction, i, ..., :size] = x
            else:
                sums[direction, i].scatter_(-1, places.expand_as(x), x)
    return grad_q, grad_k, grad_v


def _backward_through_states(
    block: Block,
    n: int,
    chunk: list[torch.Tensor],
    around: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sums: torch.Tensor,
) -> None:
    """Adds what passes through the states to the gradients of a chunk and of its sums.

    Args:
        block: the rows.
        n: number of the chunk.
        chunk: its gradient, query, key and value.
        around: S before and T behind the chunk, and U and W of what it leaves.
        grads: the gradients of query, key and value, which are added to.
        sums: the gradients of F and R, (2, rows, H, C + 1), which are added to.
    """
    (g, q, k, v), (grad_q, grad_k, grad_v), scratch = chunk, grads, block.scratch
    state_left, state_right, grad_left, grad_right = around
    size = g.shape[2]
    for name, x, y, state, grad_x, direction, sign in (
        ("read_left", q, g, state_left, grad_q, 0, 1),
        ("read_right", q, g, state_right, grad_q, 1, -1),
        ("write_left", k, v, grad_left, grad_k, 0, -1),
        ("write_right", k, v, grad_right, grad_k, 1, 1),
    ):
        factor = block.factor(name, n, size)
        part = scratch.product("part", y, state.mT).mul_(factor)
        grad_x += part
        sums[direction, :, :, :size].add_(part.mul_(x).sum(-1), alpha=sign)
        if x is k:
            add_product(grad_v, scratch.scaled(k, factor), state)


@chunkwise_backward.register_fake
def _(grad, query, key, value, left_to_right, right_to_left, order, states, scale, chunk_size):
    return tuple(torch.empty_like(x) for x in (query, key, value, left_to_right, right_to_left))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: torch.Tensor, _):
    if torch.is_grad_enabled():  # it is itself to be differentiated
        *tensors, order, _ = ctx.saved_tensors

        def function(query, key, value, left_to_right, right_to_left) -> torch.Tensor:
            edges = left_to_right, right_to_left
            rest = order, ctx.scale, ctx.chunk_size
            return chunks_again(ChunkInputs(query, key, value, *edges, *rest))

        return *gradients_again(function, tensors, grad), None, None, None, None
    grads = chunkwise_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.chunk_size)
    return *grads, None, None, None, None


def chunks_again(inputs: ChunkInputs) -> torch.Tensor:
    """The chunk form by operations that autograd knows, with decays as `chunkwise_forward`.

    Without decay the log-decays may be None.
    """
    query, key, value, left_to_right, right_to_left, order, scale, chunk_size = inputs
    if left_to_right is None or right_to_left is None:
        return chunkwise(query, key, value, None, None, scale, chunk_size)
    orders = [None] if order is None else order
    directions = [Directions(*x) for x in zip(orders, left_to_right, right_to_left)]
    with full_precision(value):
        return along_orders(chunks_at_once, (query, key, value), directions, scale, chunk_size)


chunkwise_forward.register_autograd(_backward, setup_context=_setup_context)
