"""The chunk form: attention inside a chunk, states between chunks, linear in length in time and memory.

With chunk-local exclusive prefix sums F of `forward` and R of `backward`, and their sums F_end and R_end over a chunk's
edges (the one to the next chunk included), a token i receives

    from its own chunk         sum_j M_ij (q_i . k_j) v_j       M_ij = exp(min(F_i - F_j, R_j - R_i))
    from all chunks before     exp(F_i) q_i . S                 S <- exp(F_end) S + sum_j exp(F_end - F_j) k_j v_j
    from all chunks behind     exp(R_end - R_i) q_i . T         T <- exp(R_end) T + sum_j exp(R_j) k_j v_j

(arXiv 2502.16249, section 3.3, made linear). Every exponent is at most 0. Of the two differences in M_ij the one of the
direction in which j comes before i is at most 0 and the other at least 0, so the minimum needs no triangle, and holds for
tokens in any order: one chunk serves several reading orders with one matrix of scores.

Both passes work through a chunk of a few heads at a time, whose intermediates stay in the processor's cache. Nothing but the
inputs is kept for the backward pass; of what lies between, only the states at the chunks' edges are stored, D / chunk size
times the values. The two passes are operators of torch.library, which torch.compile and torch.export take as they are for
any length; their loops would else be unrolled.
"""

import math
import threading

import torch
from torch.nn import functional as F

from .lion_naive import compute_type, full_precision, prefix_sums

# Exponents are taken to base 2: on a CPU torch.exp2 is four times as fast as torch.exp.
LOG2_E = math.log2(math.e)
# Exponents below these count as -inf. Such powers, at most 2e-28 in float32, leave no trace in a sum, but products with them
# may be denormal numbers, which a CPU multiplies a hundred times slower.
NEGLIGIBLE = {torch.float32: -92.0, torch.float64: -850.0}
# Tokens a chunk: the first row that fits the device ("" is any) and the length. A row of one chunk needs no states.
# Source: benchmarks/results/chunks-cpu.md (12 heads of 64, 1 and 8 rows, fp32 and bf16, forward and training agree).
CHUNK_SIZES = (
    # device, longest row, tokens a chunk, why
    ("cpu", 256, 256, "one chunk needs no states: 0.6 to 0.9 times the time of chunks of 128 (measured at 197 and 256 tokens)"),
    ("cpu", None, 128, "measured: 64 takes the same time and stores twice the states, 256 takes up to 1.3 times as long"),
    ("cuda", 512, 512, "one chunk needs no states, which take more launches and memory than they spare (not measured)"),
    ("", None, 256, "larger products and fewer launches than on a CPU (not measured)"),
)
# On the CPU rows of a batch are taken together up to this many heads (2 cores, products of 64 x 64 to 128 x 128 x 64).
HEADS_AT_A_TIME = 16


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
            in reading order; the mask is the mean of the masks along each order.

    Returns:
        (B, H, L, Dv) in float32, or in float64 if `value` is.
    """
    if forward is None or backward is None or query.shape[2] == 0:
        dtype = compute_type(value)
        return query.to(dtype) @ (key.to(dtype).mT @ value.to(dtype)).mul(scale)  # one state serves every token
    if order is None:
        forward, backward = forward[None], backward[None]
    return chunkwise_forward(query, key, value, forward, backward, order, scale, chunk_size)


class _Decays:
    """The masks of all chunks, and the factors of what they read, write and pass on, for decays (K, B or 1, H or 1, L or 1)."""

    def __init__(self, forward, backward, order, length: int, chunk_size: int, dtype: torch.dtype):
        self.constant = forward.shape[-1] == 1 < length  # the same on every edge: one chunk stands for all
        self.negligible = NEGLIGIBLE[dtype]
        count = 1 if self.constant else -(-length // chunk_size)
        left, right = (_chunk_sums(x, count, chunk_size) for x in (forward, backward))  # (K, B, H, N, C + 1)
        if length > chunk_size:
            factors = {
                "read_left": left[0, ..., :-1],
                "read_right": right[0, ..., -1:] - right[0, ..., :-1],
                "write_left": left[0, ..., -1:] - left[0, ..., :-1],
                "write_right": right[0, ..., :-1],
                "pass_left": left[0, ..., -1:],
                "pass_right": right[0, ..., -1:],
            }
            self.factors = {
                name: F.threshold(x, self.negligible, -math.inf).to(dtype).exp2().unsqueeze(-1).unbind(-3)
                for name, x in factors.items()
            }

        # Their differences, token i minus token j, are the exponents of a j before i and of a j after i.
        sums = [left[..., :-1], -right[..., :-1]]
        self.places = None if order is None else order.argsort()  # (K, L): when each token is read
        if order is not None:
            sums = [x.gather(-1, self.places[:, None, None, None].expand_as(x)) for x in sums]
        self.sums = [(x.to(dtype),) for x in sums]
        # On a GPU looking at the sums would wait for them.
        self.small = forward.device.type == "cpu" and min(left.min().item(), right.min().item()) > self.negligible
        if not self.small and dtype != left.dtype:  # what rounding takes is added when the large parts have cancelled
            self.sums = [(high, (x - high).to(dtype)) for x, (high,) in zip(sums, self.sums)]
        self.kept = {}

    def factor(self, name: str, rows: slice, n: int, size: int | None = None) -> torch.Tensor:
        """(B or 1, H or 1, size or 1, 1)."""
        x = self.factors[name][0 if self.constant else n]
        return (x if x.shape[0] == 1 else x[rows])[:, :, :size]

    def masks(self, rows: slice, n: int, size: int, scratch: "_Scratch") -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The mean of the masks of chunk n along each order, (B or 1, H or 1, size, size), and the masks one by one."""
        n = 0 if self.constant else n
        keep = self.constant and self.sums[0][0].shape[1] == 1  # the same for every chunk and row
        if keep and size in self.kept:
            return self.kept[size]
        masks = [self._mask(i, rows, n, size, scratch) for i in range(len(self.sums[0][0]))]
        mean = masks[0] if len(masks) == 1 else torch.add(*masks, out=scratch("mean", *masks[0].shape)).mul_(0.5)
        if keep:
            self.kept[size] = mean, masks
        return mean, masks

    def _mask(self, i: int, rows: slice, n: int, size: int, scratch: "_Scratch") -> torch.Tensor:
        exponents = []
        for name, parts in zip((f"mask {i} of {size}", "spare"), self.sums):
            high, *rest = [(x[i] if x.shape[1] == 1 else x[i, rows])[:, :, n, :size] for x in parts]
            exponent = scratch(name, *high.shape, size)
            torch.sub(high.unsqueeze(-1), high.unsqueeze(-2), out=exponent)
            for low in rest:
                exponent.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
            exponents.append(exponent)
        exponent = torch.minimum(*exponents, out=exponents[0])
        return (exponent if self.small else F.threshold_(exponent, self.negligible, -math.inf)).exp2_()


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
    log_decay = F.pad(log_decay, (0, count * chunk_size - log_decay.shape[-1]))
    return prefix_sums(log_decay.unflatten(-1, (count, chunk_size))).mul_(LOG2_E)


def _row_blocks(query: torch.Tensor) -> list[slice]:
    """Rows of the batch that are computed together."""
    batch, heads = query.shape[:2]
    step = max(1, HEADS_AT_A_TIME // heads) if query.device.type == "cpu" else max(batch, 1)
    return [slice(start, start + step) for start in range(0, batch, step)]


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total += a @ b, for a contiguous total."""
    total.view(-1, *total.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return total


@torch.library.custom_op("lion_hf::chunkwise", mutates_args=())
def chunkwise_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forward: torch.Tensor,
    backward: torch.Tensor,
    order: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
) -> torch.Tensor:
    """`chunkwise` with decays (K, B or 1, H or 1, L or 1)."""
    length, dtype = query.shape[2], compute_type(value)
    chunk_size = min(chunk_size or default_chunk_size(length, query.device.type)[0], length)
    result = torch.empty_like(value, dtype=dtype)
    with full_precision(value):
        decays, scratch = _Decays(forward, backward, order, length, chunk_size, dtype), _Scratch(query, dtype)
        for rows in _row_blocks(query):
            chunks = [x[rows].split(chunk_size, dim=2) for x in (query, key, value, result)]
            count = len(chunks[0])
            empty = query.new_zeros(*chunks[0][0].shape[:2], query.shape[-1], value.shape[-1], dtype=dtype)
            # 1. right to left: what the chunks behind each chunk left in T
            rights = [empty]
            for n in range(count - 1, 0, -1):
                _, k, v, _ = (x[n].to(dtype) for x in chunks)
                k = scratch.scaled(k, decays.factor("write_right", rows, n, k.shape[2]))
                rights.append(_add_product(rights[-1] * decays.factor("pass_right", rows, n), k.mT, v))
            left = empty
            for n in range(count):
                q, k, v = (x[n].to(dtype) for x in chunks[:3])
                size = q.shape[2]
                # 2. inside the chunk
                mask, _ = decays.masks(rows, n, size, scratch)
                output = scratch.product("output", scratch.product("scores", q, k.mT).mul_(mask), v)
                if count > 1:
                    # 3. from the chunks before and from the chunks behind
                    _add_product(output, scratch.scaled(q, decays.factor("read_left", rows, n, size)), left)
                    _add_product(output, scratch.scaled(q, decays.factor("read_right", rows, n, size)), rights.pop())
                    # 4. this chunk into S
                    if n + 1 < count:
                        k = scratch.scaled(k, decays.factor("write_left", rows, n, size))
                        left = _add_product(left * decays.factor("pass_left", rows, n), k.mT, v)
                torch.mul(output, scale, out=chunks[3][n])
    return result


@chunkwise_forward.register_fake
def _(query, key, value, forward, backward, order, scale, chunk_size):
    return torch.empty_like(value, dtype=compute_type(value))


@torch.library.custom_op("lion_hf::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forward: torch.Tensor,
    backward: torch.Tensor,
    order: torch.Tensor | None,
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
    chunk_size = min(chunk_size or default_chunk_size(length, query.device.type)[0], length)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    with full_precision(value):
        decays, scratch = _Decays(forward, backward, order, length, chunk_size, dtype), _Scratch(query, dtype)
        count, orders = -(-length // chunk_size), forward.shape[0]
        # gradients with respect to the prefix sums F and R
        lefts, rights = query.new_zeros(2, orders, *query.shape[:2], count, chunk_size + 1, dtype=dtype)
        for rows in _row_blocks(query):
            chunks = [x[rows].split(chunk_size, dim=2) for x in (grad, query, key, value, *grads)]
            empty = query.new_zeros(*chunks[0][0].shape[:2], query.shape[-1], value.shape[-1], dtype=dtype)
            # 1. right to left: T behind every chunk, and U
            states_right, grads_left = [empty], [empty]
            for n in range(count - 1, 0, -1):
                g, q, k, v = (x[n].to(dtype) for x in chunks[:4])
                k = scratch.scaled(k, decays.factor("write_right", rows, n, k.shape[2]))
                states_right.append(_add_product(states_right[-1] * decays.factor("pass_right", rows, n), k.mT, v))
                q = scratch.scaled(q, decays.factor("read_left", rows, n, q.shape[2]).mul(scale))
                grads_left.append(_add_product(grads_left[-1] * decays.factor("pass_left", rows, n), q.mT, g))
            state_left = grad_right = empty
            for n in range(count):
                g, q, k, v = (x[n].to(dtype) for x in chunks[:4])
                g, size = torch.mul(g, scale, out=scratch("grad", *g.shape)), g.shape[2]
                # 2. inside the chunk
                mask, masks = decays.masks(rows, n, size, scratch)
                scores, grad_weights = scratch.product("scores", q, k.mT), scratch.product("grad_weights", g, v.mT)
                weights = torch.mul(scores, mask, out=scratch("weights", *scores.shape))
                grad_v = scratch.product("grad_v", weights.mT, g)
                pairs = weights if orders == 1 else scores
                pairs.mul_(grad_weights)
                grad_weights.mul_(mask)
                grad_q, grad_k = scratch.product("grad_q", grad_weights, k), scratch.product("grad_k", grad_weights.mT, q)
                for i in range(orders):
                    places = slice(size) if order is None else decays.places[i]
                    if orders > 1:
                        pairs = torch.mul(scores, masks[i], out=weights).mul_(1 / orders)
                    change = pairs.sum(-2) - pairs.sum(-1)
                    if order is None:
                        pairs.tril_(-1)
                    else:
                        pairs.mul_(places[:, None] > places)
                    earlier = pairs.sum(-1) - pairs.sum(-2)
                    lefts[i, rows, :, n][..., places] = earlier
                    rights[i, rows, :, n][..., places] = change + earlier
                if count > 1:
                    # 3. through the states
                    state_right, grad_left = states_right.pop(), grads_left.pop()
                    for name, x, y, state, grad_x, sums, sign in (
                        ("read_left", q, g, state_left, grad_q, lefts, 1),
                        ("read_right", q, g, state_right, grad_q, rights, -1),
                        ("write_left", k, v, grad_left, grad_k, lefts, -1),
                        ("write_right", k, v, grad_right, grad_k, rights, 1),
                    ):
                        factor = decays.factor(name, rows, n, size)
                        part = scratch.product("part", y, state.mT).mul_(factor)
                        grad_x += part
                        sums[0, rows, :, n, :size].add_(part.mul_(x).sum(-1), alpha=sign)
                        if x is k:
                            _add_product(grad_v, scratch.scaled(k, factor), state)
                    # 4. this chunk into S and W
                    write, read = (decays.factor(name, rows, n, size) for name in ("write_left", "read_right"))
                    state_left = state_left * decays.factor("pass_left", rows, n)
                    grad_right = grad_right * decays.factor("pass_right", rows, n)
                    _add_product(state_left, scratch.scaled(k, write).mT, v)
                    _add_product(grad_right, scratch.scaled(q, read).mT, g)
                    lefts[0, rows, :, n, -1] = (state_left * grad_left).sum((-1, -2))
                    rights[0, rows, :, n, -1] = (grad_right * state_right).sum((-1, -2))
                for result, x in zip(chunks[4:], (grad_q, grad_k, grad_v)):
                    result[n].copy_(x)
        edges = []
        for sums in (lefts, rights):
            sums = sums.double().flip(-1).cumsum(-1).flip(-1)[..., 1:].flatten(-2)[..., :length]
            edges.append(sums.sum_to_size(forward.shape).to(forward.dtype))
    return *grads, *edges


@chunkwise_backward.register_fake
def _(grad, query, key, value, forward, backward, order, scale, chunk_size):
    return tuple(torch.empty_like(x) for x in (query, key, value, forward, backward))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: torch.Tensor):
    return *chunkwise_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.chunk_size), None, None, None


chunkwise_forward.register_autograd(_backward, setup_context=_setup_context)
