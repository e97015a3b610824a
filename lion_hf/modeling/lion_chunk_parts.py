"""Parts of the chunk form: the decays of all chunks, buffers, and products in place."""

import math
import threading
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .lion_choice import default_chunk_size
from .lion_numerics import prefix_sums, sum_type

# Exponents are taken to base 2: on a CPU torch.exp2 is four times as fast as torch.exp.
LOG2_E = math.log2(math.e)
# Exponents below these count as -inf. Such powers, at most 2e-28 in float32, leave no trace in a
# sum, but products with them may be denormal numbers, which a CPU multiplies a hundred times
# slower.
NEGLIGIBLE = {torch.float32: -92.0, torch.float64: -850.0}
# Sums that span so many times `NEGLIGIBLE`, taken from their middle, have powers in range, also
# times a scale up to this one, or its inverse.
LARGEST_RANGE, LARGEST_SCALE = 2.25, 256
# Of larger sums the roots are in range. Squaring a root takes half the time of a power.
MOST_ROOTS = 3
# On the CPU rows of a batch are computed together up to this many scores: 16 heads of 128 x 128,
# 1 MiB in float32.
SCORES_AT_A_TIME = 2**18


class ChunkInputs(NamedTuple):
    """What the chunk form computes; the arguments of its operators, in their order."""

    query: torch.Tensor  # (B, H, L, D)
    key: torch.Tensor  # (B, H, L, D)
    value: torch.Tensor  # (B, H, L, Dv)
    left_to_right: torch.Tensor  # (K, B or 1, H or 1, L or 1)
    right_to_left: torch.Tensor  # likewise
    order: torch.Tensor | None  # (K, L) or (K, B, L), for rows of one chunk
    scale: float
    chunk_size: int | None

    def tokens_per_chunk(self) -> int:
        """The chunk size, chosen if it is not given, and at most the length."""
        length = self.query.shape[2]
        default = default_chunk_size(length, self.query.device.type)[0]
        return min(self.chunk_size or default, length)


class Decays:
    """The masks of all chunks, and the factors of what they read, write and pass on.

    Masks and the factors of what is read contain the scale of the scores.
    """

    def __init__(self, inputs: ChunkInputs, chunk_size: int, dtype: torch.dtype):
        edges = torch.stack([inputs.left_to_right, inputs.right_to_left])
        length, order = inputs.query.shape[2], inputs.order
        self.constant = edges.shape[-1] == 1 < length  # on every edge: one chunk stands for all
        self.scale, self.chunk_size, self.negligible = inputs.scale, chunk_size, NEGLIGIBLE[dtype]
        count = 1 if self.constant else -(-length // chunk_size)
        sums = _chunk_sums(edges, count, chunk_size)  # (2, K, B, H, N, C + 1)
        # On a GPU looking at the sums would wait for them.
        least = sums.min().item() if edges.device.type == "cpu" else -math.inf
        self.roots = self._roots(least)
        self.tiny = least <= self.negligible  # whether a mask may have negligible entries
        left, right = sums[:, 0].unbind()
        self.factors = self._factors(left, right, dtype) if length > chunk_size else {}

        # Their differences, token i minus token j, are the exponents of a j before i and of a j
        # after i.
        half = sums[..., -1:] / 2  # a difference does not change, but powers of both signs fit
        sums = torch.stack([(sums - half)[0, ..., :-1], (half - sums)[1, ..., :-1]])
        self.places = None  # when each token is read, (K, B or 1, L)
        if order is not None:
            places = order.argsort()
            self.places = places[:, None] if places.dim() == 2 else places
            shape = torch.broadcast_shapes(sums.shape, (*self.places.shape[:2], 1, 1, length))
            index = self.places[:, :, None, None].expand(shape)
            sums = sums.expand(shape).gather(-1, index)
        if self.roots is not None:  # powers of differences are products of powers, all in range
            root = 0.5**self.roots
            powers = sums.mul_(root).exp2()
            self.parts = [powers.mul(self.scale**root).to(dtype), powers.reciprocal().to(dtype)]
        else:
            self.parts = [sums.to(dtype)]
            if dtype != sums.dtype:  # what rounding takes is added when large parts have cancelled
                self.parts.append((sums - self.parts[0]).to(dtype))
        self.kept: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def _roots(self, least: float) -> int | None:
        """How many square roots bring the powers of all sums into range; None for too many."""
        if 1 / LARGEST_SCALE <= self.scale <= LARGEST_SCALE:
            for roots in range(MOST_ROOTS + 1):
                if least * 0.5**roots > LARGEST_RANGE * self.negligible:
                    return roots
        return None

    def empty_gradients(self, inputs: ChunkInputs) -> torch.Tensor:
        """Zeros for the gradients of the prefix sums F and R, (2, K, B, H, N, C + 1)."""
        query, count = inputs.query, -(-inputs.query.shape[2] // self.chunk_size)
        shape = 2, inputs.left_to_right.shape[0], *query.shape[:2], count, self.chunk_size + 1
        return query.new_zeros(shape, dtype=self.parts[0].dtype)

    def _factors(
        self, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
    ) -> dict[str, list[torch.Tensor]]:
        exponents = {
            "read_left": left[..., :-1],
            "read_right": right[..., -1:] - right[..., :-1],
            "write_left": left[..., -1:] - left[..., :-1],
            "write_right": right[..., :-1],
            "pass_left": left[..., -1:],
            "pass_right": right[..., -1:],
        }
        factors = {}
        for name, x in exponents.items():
            factors[name] = list(powers_of_two(x, dtype).unsqueeze(-1).unbind(-3))
        for name in ("read_left", "read_right"):
            factors[name] = [x.mul_(self.scale) for x in factors[name]]
        return factors

    def factor(self, name: str, rows: slice, n: int, size: int | None = None) -> torch.Tensor:
        """The factor of chunk n, (B or 1, H or 1, size or 1, 1)."""
        x = self.factors[name][0 if self.constant else n]
        x = x if x.shape[0] == 1 else x[rows]
        return x if size is None or size == x.shape[2] else x[:, :, :size]

    def masks(
        self, rows: slice, n: int, size: int, scratch: "Scratch"
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The mean of the masks of chunk n along each order, and the masks one by one.

        Each is (B or 1, H or 1, size, size).
        """
        n = 0 if self.constant else n
        keep = self.constant and self.parts[0].shape[2] == 1  # the same for every chunk and row
        if keep and size in self.kept:
            return self.kept[size]
        masks = [self._mask(i, rows, n, size, scratch) for i in range(self.parts[0].shape[1])]
        mean = masks[0]
        if len(masks) > 1:
            mean = torch.add(masks[0], masks[1], out=scratch("mean", *mean.shape))
            for mask in masks[2:]:
                mean.add_(mask)
            mean.mul_(1 / len(masks))
        if keep:
            self.kept[size] = mean, masks
        return mean, masks

    def _mask(self, i: int, rows: slice, n: int, size: int, scratch: "Scratch") -> torch.Tensor:
        parts = [x[:, i] if x.shape[2] == 1 else x[:, i, rows] for x in self.parts]
        parts = [x[:, :, :, n, :size] for x in parts]  # (2, B, H, size)
        name = "whole" if size == self.chunk_size else "rest"
        mask = scratch(f"mask {i} {name}", *parts[0].shape[1:], size)
        both = mask, scratch("spare", *mask.shape)
        if self.roots is not None:
            for to, at, out in zip(*parts, both):
                torch.mul(to.unsqueeze(-1), at.unsqueeze(-2), out=out)
            torch.minimum(*both, out=mask)
            for _ in range(self.roots):
                mask.square_()
            return torch.threshold_(mask, self.scale * 2**self.negligible, 0) if self.tiny else mask
        for direction, out in enumerate(both):
            high, *rest = [x[direction] for x in parts]
            torch.sub(high.unsqueeze(-1), high.unsqueeze(-2), out=out)
            for low in rest:
                out.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
        exponents = torch.threshold_(torch.minimum(*both, out=mask), self.negligible, -math.inf)
        return exponents.exp2_().mul_(self.scale)


class Scratch:
    """Named buffers that every chunk writes anew.

    On the CPU those of moderate size outlive the call, one set per thread. Memory that is given
    back to the system comes back zeroed, page by page, which takes longer than what is computed in
    it (197 tokens: 1.0 and 1.9 ms).
    """

    kept = threading.local()
    largest_kept = 2**22  # elements per buffer

    def __init__(self, like: torch.Tensor, dtype: torch.dtype):
        self.like, self.dtype = like, dtype
        self.memory: dict[str, torch.Tensor] = {}
        if like.device.type == "cpu":
            self.memory = self.kept.__dict__.setdefault(str(dtype), {})

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        buffer = self.memory.get(name)
        if buffer is None or buffer.numel() < size:
            # a buffer made in inference mode could not be written outside of it
            with torch.inference_mode(False):
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


class Block:
    """Some rows of the batch that are computed together, chunk by chunk."""

    def __init__(self, inputs: ChunkInputs, decays: Decays, scratch: Scratch, rows: slice):
        self.rows, self.decays, self.scratch = rows, decays, scratch
        tensors = (inputs.query, inputs.key, inputs.value)
        self.query, self.key, self.value = (self.chunks(x) for x in tensors)
        self.count = len(self.query)
        # the state at a row's ends, (rows, H, D, Dv)
        query, value = self.query[0], self.value[0]
        shape = (*query.shape[:2], query.shape[-1], value.shape[-1])
        self.no_state = query.new_zeros(shape if self.count > 1 else 0, dtype=scratch.dtype)

    def chunks(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The chunks of a tensor's rows, (rows, H, C, D) each."""
        if self.rows != slice(0, x.shape[0]):
            x = x[self.rows]
        size = self.decays.chunk_size
        return (x,) if x.shape[2] == size else x.split(size, dim=2)

    def read(self, n: int, *tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Chunk n of the tensors in the type of the computation.

        They are laid out so that the heads of several rows are one batch of matrices.
        """
        chunks = [x[n].to(self.scratch.dtype) for x in tensors]
        return [x if x.shape[0] == 1 else x.contiguous() for x in chunks]

    def factor(self, name: str, n: int, size: int | None = None) -> torch.Tensor:
        return self.decays.factor(name, self.rows, n, size)

    def places(self, i: int) -> torch.Tensor | None:
        """When order i reads each token, (rows or 1, 1, L); None for tokens as they stand."""
        if self.decays.places is None:
            return None
        places = self.decays.places[i]
        return (places if places.shape[0] == 1 else places[self.rows])[:, None]

    def masks(self, n: int, size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.decays.masks(self.rows, n, size, self.scratch)

    def pass_on(
        self,
        side: str,
        n: int,
        state: torch.Tensor,
        written: tuple,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """state * factor + a^T b for `written` = (a, b), in a new tensor or a contiguous `out`."""
        a, b = written
        return add_product(torch.mul(state, self.factor(f"pass_{side}", n), out=out), a.mT, b)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total += a @ b, for a contiguous total."""
    total.view(-1, *total.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return total


def row_blocks(query: torch.Tensor, chunk_size: int) -> list[slice]:
    """Rows of the batch that are computed together."""
    batch, heads = query.shape[:2]
    step = max(batch, 1)
    if query.device.type == "cpu":
        step = max(1, SCORES_AT_A_TIME // max(1, heads * chunk_size**2))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def edge_gradients(sums: torch.Tensor, inputs: ChunkInputs) -> list[torch.Tensor]:
    """Gradients of the log-decays in both directions, from those of the prefix sums F and R.

    They lie in memory as the log-decays do, which compiled programs rely on.
    """
    both, length = (inputs.left_to_right, inputs.right_to_left), inputs.query.shape[2]
    later = sums.to(sum_type(sums)).flip(-1).cumsum(-1).flip(-1)
    edges = later[..., 1:].flatten(-2)[..., :length]
    return [torch.empty_like(like).copy_(x.sum_to_size(like.shape)) for x, like in zip(edges, both)]


def powers_of_two(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2 to the exponents, at most 0, in a type of `NEGLIGIBLE`, with zeros for negligible ones."""
    return F.threshold(exponents, NEGLIGIBLE[dtype], -math.inf).to(dtype).exp2()


def _chunk_sums(log_decay: torch.Tensor, count: int, chunk_size: int) -> torch.Tensor:
    """Every chunk's exclusive prefix sums to base 2, and at their end its whole sum.

    (..., L or 1) becomes (..., N, C + 1).
    """
    if count == 1:
        log_decay = log_decay.expand(*log_decay.shape[:-1], chunk_size)
    if log_decay.shape[-1] != count * chunk_size:
        log_decay = F.pad(log_decay, (0, count * chunk_size - log_decay.shape[-1]))
    return prefix_sums(log_decay.unflatten(-1, (count, chunk_size))).mul_(LOG2_E)
