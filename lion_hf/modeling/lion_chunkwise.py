"""The chunk form: attention inside a chunk, states between chunks, linear in length in time and memory.

With chunk-local exclusive prefix sums F of `forward` and R of `backward`, and their sums F_end and R_end over a chunk's
edges (the one to the next chunk included), a token i receives

    from its own chunk         sum_j M_ij (q_i . k_j) v_j       M_ij = exp(min(F_i - F_j, R_j - R_i))
    from all chunks before     exp(F_i) q_i . S                 S <- exp(F_end) S + sum_j exp(F_end - F_j) k_j v_j
    from all chunks behind     exp(R_end - R_i) q_i . T         T <- exp(R_end) T + sum_j exp(R_j) k_j v_j

(arXiv 2502.16249, section 3.3, made linear). Every exponent is at most 0. Of the two differences in M_ij the one of the
direction in which j comes before i is at most 0 and the other at least 0, so the minimum needs no triangle, and holds for
tokens in any order: one chunk serves several reading orders with one matrix of scores.

Both passes work through a chunk of a few heads at a time, whose intermediates stay in the processor's cache. For the backward
pass the inputs are kept and the states at the edges between chunks, 2 D / chunk size times the values; the rest is computed
again. The two passes are operators of torch.library, which torch.compile and torch.export take as they are for
any length; their loops would else be unrolled.
"""

import math
import sys
import threading

import torch
from torch.nn import functional as F

from .lion_naive import compute_type, full_precision, needs_grad, prefix_sums
from .lion_portable import chunks_at_once, needs_plain_operations

# Exponents are taken to base 2: on a CPU torch.exp2 is four times as fast as torch.exp.
LOG2_E = math.log2(math.e)
# Exponents below these count as -inf. Such powers, at most 2e-28 in float32, leave no trace in a sum, but products with them
# may be denormal numbers, which a CPU multiplies a hundred times slower.
NEGLIGIBLE = {torch.float32: -92.0, torch.float64: -850.0}
# Tokens a chunk: the first row that fits the device ("" is any) and the length. A row of one chunk needs no states.
# Source: benchmarks/results/chunks-cpu.md and chunks-cpu-bfloat16.md (12 heads of 64; forward and training agree).
CHUNK_SIZES = (
    # device, longest row, tokens a chunk, why
    ("cpu", 256, 256, "one chunk needs no states: 0.7 to 0.9 times the time of chunks of 128 (measured at 197 and 256 tokens)"),
    ("cpu", None, 128, "measured: 64 takes up to 1.1 times as long and stores twice the states, 256 up to 1.3 times"),
    ("cuda", 512, 512, "one chunk needs no states, which take more launches and memory than they spare (not measured)"),
    ("", None, 256, "larger products and fewer launches than on a CPU (not measured)"),
)
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
# On the CPU rows of a batch are taken together up to this many scores: 16 heads of 128 x 128, 1 MiB in float32.
SCORES_AT_A_TIME = 2**18


def default_chunk_size(length: int, device_type: str) -> tuple[int, str]:
    """Tokens a chunk for rows of a length on a device, and why."""
    for device, longest, size, reason in CHUNK_SIZES:
        if device in ("", device_type) and (longest is None or length <= longest):
            return size, reason
    raise AssertionError("the last row of CHUNK_SIZES fits everything")


def chunkwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """The chunk form of the operation.

    Args:
        query: (B, H, L, D), of any strides and floating-point type.
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        forward: log-decays left to right, finite, (B or 1, H or 1, L or 1), or None for no decay.
        backward: log-decays right to left, likewise.
        scale: factor of the scores.
        chunk_size: tokens a chunk, None for that of `CHUNK_SIZES`; the last one may be shorter. Without decay there are none.
        order: (K, L), reading orders of a row that fits into one chunk. The decays then have a leading dimension K and stand
            in reading order; the mask is the mean of the masks along each order. Not where `needs_plain_operations`.

    Returns:
        (B, H, L, Dv) in float32, or in float64 if `value` is.
    """
    if forward is None or backward is None or 0 in (*query.shape, *value.shape):
        dtype = compute_type(value)
        return query.to(dtype) @ (key.to(dtype).mT @ value.to(dtype)).mul(scale)  # one state serves every token
    if needs_plain_operations(query, key, value, forward, backward):
        return chunks_at_once(query, key, value, forward, backward, scale, chunk_size)
    if order is None:
        forward, backward = forward[None], backward[None]
    inputs = query, key, value, forward, backward
    keep_states = needs_grad(*inputs) and not torch.compiler.is_exporting()  # exported programs serve any number of chunks
    chunk_size = chunk_size if chunk_size is None else min(chunk_size, sys.maxsize)  # what an operator takes
    # Where nothing is recorded, compiled, exported or only pretended (fake tensors), an operator would only cost time.
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = not (keep_states or tracing) and all(type(x) in PLAIN_TYPES for x in inputs)
    return (_forward if plain else chunkwise_forward)(*inputs, order, scale, chunk_size, keep_states)[0]


class _Decays:
    """The masks of all chunks, and the factors of what they read, write and pass on, for decays (K, B or 1, H or 1, L or 1).

    Masks and the factors of what is read contain the scale of the scores.
    """

    def __init__(self, forward, backward, order, scale: float, length: int, chunk_size: int, dtype: torch.dtype):
        self.constant = forward.shape[-1] == 1 < length  # the same on every edge: one chunk stands for all
        self.scale, self.chunk_size, self.negligible = scale, chunk_size, NEGLIGIBLE[dtype]
        count = 1 if self.constant else -(-length // chunk_size)
        sums = _chunk_sums(torch.stack([forward, backward]), count, chunk_size)  # (2, K, B, H, N, C + 1)
        # On a GPU looking at the sums would wait for them.
        self.small = forward.device.type == "cpu" and sums.min().item() > self.negligible
        if length > chunk_size:
            left, right = sums[:, 0]
            factors = {
                "read_left": left[..., :-1],
                "read_right": right[..., -1:] - right[..., :-1],
                "write_left": left[..., -1:] - left[..., :-1],
                "write_right": right[..., :-1],
                "pass_left": left[..., -1:],
                "pass_right": right[..., -1:],
            }
            self.factors = {
                name: F.threshold(x, self.negligible, -math.inf).to(dtype).exp2().unsqueeze(-1).unbind(-3)
                for name, x in factors.items()
            }
            for name in ("read_left", "read_right"):
                self.factors[name] = [x.mul_(scale) for x in self.factors[name]]

        # Their differences, token i minus token j, are the exponents of a j before i and of a j after i.
        sums = torch.stack([sums[0, ..., :-1], -sums[1, ..., :-1]])
        self.places = None if order is None else order.argsort()  # (K, L): when each token is read
        if order is not None:
            sums = sums.gather(-1, self.places[:, None, None, None].expand_as(sums))
        if self.small:  # powers of all sums are in range: those of the differences are their products
            powers = sums.exp2()
            self.parts = [powers.mul(scale).to(dtype), powers.reciprocal().to(dtype)]
        else:
            self.parts = [sums.to(dtype)]
            if dtype != sums.dtype:  # what rounding takes is added when the large parts have cancelled
                self.parts.append((sums - self.parts[0]).to(dtype))
        self.kept = {}

    def factor(self, name: str, rows: slice, n: int, size: int | None = None) -> torch.Tensor:
        """(B or 1, H or 1, size or 1, 1)."""
        x = self.factors[name][0 if self.constant else n]
        x = x if x.shape[0] == 1 else x[rows]
        return x if size is None or size == x.shape[2] else x[:, :, :size]

    def masks(self, rows: slice, n: int, size: int, scratch: "_Scratch") -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The mean of the masks of chunk n along each order, (B or 1, H or 1, size, size), and the masks one by one."""
        n = 0 if self.constant else n
        keep = self.constant and self.parts[0].shape[2] == 1  # the same for every chunk and row
        if keep and size in self.kept:
            return self.kept[size]
        masks = [self._mask(i, rows, n, size, scratch) for i in range(self.parts[0].shape[1])]
        mean = masks[0]
        if len(masks) > 1:
            mean = torch.add(*masks[:2], out=scratch("mean", *mean.shape))
            for mask in masks[2:]:
                mean.add_(mask)
            mean.mul_(1 / len(masks))
        if keep:
            self.kept[size] = mean, masks
        return mean, masks

    def _mask(self, i: int, rows: slice, n: int, size: int, scratch: "_Scratch") -> torch.Tensor:
        parts = [(x[:, i] if x.shape[2] == 1 else x[:, i, rows])[:, :, :, n, :size] for x in self.parts]  # (2, B, H, size)
        mask = scratch(f"mask {i} {'whole' if size == self.chunk_size else 'rest'}", *parts[0].shape[1:], size)
        both = mask, scratch("spare", *mask.shape)
        if self.small:
            for to, at, out in zip(*parts, both):
                torch.mul(to.unsqueeze(-1), at.unsqueeze(-2), out=out)
            return (torch.minimum if self.scale >= 0 else torch.maximum)(*both, out=mask)
        for direction, out in enumerate(both):
            high, *rest = [x[direction] for x in parts]
            torch.sub(high.unsqueeze(-1), high.unsqueeze(-2), out=out)
            for low in rest:
                out.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
        return F.threshold_(torch.minimum(*both, out=mask), self.negligible, -math.inf).exp2_().mul_(self.scale)


class _Scratch:
    """Named buffers that every chunk writes anew.

    On the CPU those of moderate size outlive the call, one set a thread: memory that is given back to the system comes back
    zeroed, page by page, which takes longer than what is computed in it (197 tokens: 1.0 and 1.9 ms).
    """

    kept = threading.local()
    largest_kept = 2**22  # elements a buffer

    def __init__(self, like: torch.Tensor, dtype: torch.dtype):
        self.like, self.dtype, self.memory = like, dtype, {}
        if like.device.type == "cpu":
            self.memory = self.kept.__dict__.setdefault(str(dtype), {})

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        buffer = self.memory.get(name)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside of it
                buffer = self.like.new_empty(size, dtype=self.dtype)
            if self.like.device.type != "cpu" or size <= self.largest_kept:
                self.memory[name] = buffer
        return buffer[:size].view(shape)

    def product(self, name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a @ b, (B, H, m, n)."""
        out = self(name, *a.shape[:3], b.shape[-1])
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.view(-1, *out.shape[2:]))
        return out

    def scaled(self, a: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
        """a * factor, to be used before the next call."""
        return torch.mul(a, factor, out=self("scaled", *a.shape))


def _chunk_sums(log_decay: torch.Tensor, count: int, chunk_size: int) -> torch.Tensor:
    """Every chunk's exclusive prefix sums to base 2 and at their end its whole sum, (..., L or 1) to (..., N, C + 1)."""
    if count == 1:
        log_decay = log_decay.expand(*log_decay.shape[:-1], chunk_size)
    if log_decay.shape[-1] != count * chunk_size:
        log_decay = F.pad(log_decay, (0, count * chunk_size - log_decay.shape[-1]))
    return prefix_sums(log_decay.unflatten(-1, (count, chunk_size))).mul_(LOG2_E)


def _row_blocks(query: torch.Tensor, chunk_size: int) -> list[slice]:
    """Rows of the batch that are computed together."""
    batch, heads = query.shape[:2]
    step = max(batch, 1)
    if query.device.type == "cpu":
        step = max(1, SCORES_AT_A_TIME // max(1, heads * chunk_size**2))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _chunks(x: torch.Tensor, rows: slice, chunk_size: int) -> tuple[torch.Tensor, ...]:
    """The chunks of some rows, (rows, H, C, D) each."""
    if rows != slice(0, x.shape[0]):
        x = x[rows]
    return (x,) if x.shape[2] == chunk_size else x.split(chunk_size, dim=2)


def _pass_on(state: torch.Tensor, factor: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out=None) -> torch.Tensor:
    """state * factor + a^T b, (B, H, D, Dv), in a new tensor or in a contiguous `out`."""
    return _add_product(torch.mul(state, factor, out=out), a.mT, b)


def _no_state(chunks: list[tuple[torch.Tensor, ...]], dtype: torch.dtype) -> torch.Tensor | None:
    """The state at a row's ends, (rows, H, D, Dv), for chunks of the output, query, key and value; None for one chunk."""
    if len(chunks[0]) == 1:
        return None
    query, value = chunks[1][0], chunks[3][0]
    return query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1], dtype=dtype)


def _ready(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A chunk in the type of the computation, and so laid out that the heads of several rows are one batch of matrices."""
    return x.to(dtype) if x.shape[0] == 1 else x.to(dtype).contiguous()


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total += a @ b, for a contiguous total."""
    total.view(-1, *total.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return total


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forward: torch.Tensor,
    backward: torch.Tensor,
    order: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunkwise` with decays (K, B or 1, H or 1, L or 1).

    Returns:
        The output, and with `keep_states` the states S and T at the edges between chunks, (2, N - 1, B, H, D, Dv), for the
        backward pass.
    """
    length, dtype = query.shape[2], compute_type(value)
    chunk_size = min(chunk_size or default_chunk_size(length, query.device.type)[0], length)
    result, states = _empty_results(query, value, chunk_size, keep_states)
    with full_precision(value):
        decays, scratch = _Decays(forward, backward, order, scale, length, chunk_size, dtype), _Scratch(query, dtype)
        for rows in _row_blocks(query, chunk_size):
            chunks = [_chunks(x, rows, chunk_size) for x in (result, query, key, value)]
            count = len(chunks[0])
            empty = _no_state(chunks, dtype)
            if count > 1:  # in one piece, since small pieces of memory are not given back
                rights = states[1, :, rows] if keep_states else empty.new_empty(count - 1, *empty.shape)
            # 1. right to left: what the chunks behind each chunk left in T
            right = empty
            for n in range(count - 1, 0, -1):
                k, v = (_ready(x[n], dtype) for x in chunks[2:])
                k = scratch.scaled(k, decays.factor("write_right", rows, n, k.shape[2]))
                right = _pass_on(right, decays.factor("pass_right", rows, n), k, v, rights[n - 1])
            left = empty
            for n in range(count):
                q, k, v = (_ready(x[n], dtype) for x in chunks[1:])
                size = q.shape[2]
                # 2. inside the chunk
                mask, _ = decays.masks(rows, n, size, scratch)
                output = scratch.product("output", scratch.product("spare", q, k.mT).mul_(mask), v)
                if count > 1:
                    # 3. from the chunks before and from the chunks behind
                    _add_product(output, scratch.scaled(q, decays.factor("read_left", rows, n, size)), left)
                    right = rights[n] if n + 1 < count else empty
                    _add_product(output, scratch.scaled(q, decays.factor("read_right", rows, n, size)), right)
                    # 4. this chunk into S
                    if n + 1 < count:
                        k = scratch.scaled(k, decays.factor("write_left", rows, n, size))
                        out = states[0, n, rows] if keep_states else None
                        left = _pass_on(left, decays.factor("pass_left", rows, n), k, v, out)
                chunks[0][n].copy_(output)
    return result, states


chunkwise_forward = torch.library.custom_op("lion_hf::chunkwise", _forward, mutates_args=())


def _empty_results(query, value, chunk_size: int, keep_states: bool) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, shape = compute_type(value), (0,)
    if keep_states:
        shape = 2, -(-query.shape[2] // chunk_size) - 1, *query.shape[:2], query.shape[-1], value.shape[-1]
    return torch.empty_like(value, dtype=dtype), query.new_empty(shape, dtype=dtype)


@chunkwise_forward.register_fake
def _(query, key, value, forward, backward, order, scale, chunk_size, keep_states):
    if keep_states:
        chunk_size = min(chunk_size or default_chunk_size(query.shape[2], query.device.type)[0], query.shape[2])
    return _empty_results(query, value, chunk_size, keep_states)


@torch.library.custom_op("lion_hf::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forward: torch.Tensor,
    backward: torch.Tensor,
    order: torch.Tensor | None,
    states: torch.Tensor,
    scale: float,
    chunk_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `chunkwise_forward` with respect to its five tensors, for the output's gradient g, (B, H, L, Dv).

    With U and W, the gradients with respect to the states S and T that a chunk leaves, and P_ij = M_ij q_i . k_j,

        dq_i = sum_j M_ij (g_i . v_j) k_j + exp(F_i) S g_i + exp(R_end - R_i) T g_i
        dk_j = sum_i M_ij (g_i . v_j) q_i + exp(F_end - F_j) U v_j + exp(R_j) W v_j
        dv_j = sum_i P_ij g_i + exp(F_end - F_j) U^T k_j + exp(R_j) W^T k_j
        dF_i = sum_(j before i) P_ij g_i . v_j - sum_(j after i) P_ji g_j . v_i
               + exp(F_i) q_i S g_i - exp(F_end - F_i) k_i U v_i

    with dF_end = <S, U> after the chunk; R likewise, mirrored. Gradients of the edges are sums of dF over all later places.
    """
    length, dtype = query.shape[2], compute_type(value)
    if states.dim() == 1:  # exported programs do not keep them
        states = _forward(query, key, value, forward, backward, order, scale, chunk_size, True)[1]
    chunk_size = min(chunk_size or default_chunk_size(length, query.device.type)[0], length)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    with full_precision(value):
        decays, scratch = _Decays(forward, backward, order, scale, length, chunk_size, dtype), _Scratch(query, dtype)
        count, orders = -(-length // chunk_size), forward.shape[0]
        # gradients with respect to the prefix sums F and R
        sums = query.new_zeros(2, orders, *query.shape[:2], count, chunk_size + 1, dtype=dtype)
        for rows in _row_blocks(query, chunk_size):
            chunks = [_chunks(x, rows, chunk_size) for x in (grad, query, key, value, *grads)]
            empty = _no_state(chunks, dtype)
            left, right = states[:, :, rows].unbind()
            states_left, states_right = [empty, *left, empty], [*right, empty]
            # 1. right to left: U
            grads_left = [empty]
            for n in range(count - 1, 0, -1):
                g, q = (_ready(x[n], dtype) for x in chunks[:2])
                q = scratch.scaled(q, decays.factor("read_left", rows, n, q.shape[2]))
                grads_left.append(_pass_on(grads_left[-1], decays.factor("pass_left", rows, n), q, g))
            grad_right = empty
            for n in range(count):
                g, q, k, v = (_ready(x[n], dtype) for x in chunks[:4])
                size = g.shape[2]
                # 2. inside the chunk
                mask, masks = decays.masks(rows, n, size, scratch)
                scores, grad_weights = scratch.product("scores", q, k.mT), scratch.product("grad_weights", g, v.mT)
                weights = torch.mul(scores, mask, out=scratch("spare", *scores.shape))
                grad_v = scratch.product("grad_v", weights.mT, g)
                pairs = weights if orders == 1 else scores
                pairs.mul_(grad_weights)
                grad_weights.mul_(mask)
                grad_q, grad_k = scratch.product("grad_q", grad_weights, k), scratch.product("grad_k", grad_weights.mT, q)
                for i in range(orders):
                    places = slice(size) if order is None else decays.places[i]
                    if orders > 1:
                        pairs = torch.mul(scores, masks[i], out=weights).mul_(1 / orders)
                    pairs.diagonal(dim1=-2, dim2=-1).zero_()  # a token has no edge to itself: its part would leave rounding
                    change = pairs.sum(-2) - pairs.sum(-1)
                    if order is None:
                        pairs.tril_(-1)
                    else:
                        pairs.mul_(places[:, None] > places)
                    earlier = pairs.sum(-1) - pairs.sum(-2)
                    sums[0, i, rows, :, n][..., places] = earlier
                    sums[1, i, rows, :, n][..., places] = change.add_(earlier)
                if count > 1:
                    # 3. through the states
                    grad_left = grads_left.pop()
                    for name, x, y, state, grad_x, direction, sign in (
                        ("read_left", q, g, states_left[n], grad_q, 0, 1),
                        ("read_right", q, g, states_right[n], grad_q, 1, -1),
                        ("write_left", k, v, grad_left, grad_k, 0, -1),
                        ("write_right", k, v, grad_right, grad_k, 1, 1),
                    ):
                        factor = decays.factor(name, rows, n, size)
                        part = scratch.product("part", y, state.mT).mul_(factor)
                        grad_x += part
                        sums[direction, 0, rows, :, n, :size].add_(part.mul_(x).sum(-1), alpha=sign)
                        if x is k:
                            _add_product(grad_v, scratch.scaled(k, factor), state)
                    # 4. this chunk into W
                    q = scratch.scaled(q, decays.factor("read_right", rows, n, size))
                    grad_right = _pass_on(grad_right, decays.factor("pass_right", rows, n), q, g)
                    sums[0, 0, rows, :, n, -1] = (states_left[n + 1] * grad_left).sum((-1, -2))
                    sums[1, 0, rows, :, n, -1] = (grad_right * states_right[n]).sum((-1, -2))
                for result, x in zip(chunks[4:], (grad_q, grad_k, grad_v)):
                    result[n].copy_(x)
        edges = sums.double().flip(-1).cumsum(-1).flip(-1)[..., 1:].flatten(-2)[..., :length]
    return *grads, *(x.sum_to_size(forward.shape).to(forward.dtype, copy=True) for x in edges)


@chunkwise_backward.register_fake
def _(grad, query, key, value, forward, backward, order, states, scale, chunk_size):
    return tuple(torch.empty_like(x) for x in (query, key, value, forward, backward))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: torch.Tensor, _):
    return *chunkwise_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.chunk_size), None, None, None, None


chunkwise_forward.register_autograd(_backward, setup_context=_setup_context)
