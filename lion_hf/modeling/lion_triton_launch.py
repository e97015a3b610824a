"""How the fused GPU kernels are cut, and their launches; lion_triton.py makes operators of them."""

from typing import NamedTuple

import torch

from .lion_choice import default_chunk_size
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

LARGEST_HEAD = 256
# Without decay chunks only share out the sum over the row.
PLAIN_CHUNK_SIZE = 1024
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
# not measured: tiles of 64 rows use the warp-group products of half types; the gradients keep more
# tiles at once, so theirs are narrower; float32 takes three products for one and twice the space.
# Of half types next to no registers spill, of float32 some (see tests/modeling/test_triton.py).
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


# The kernels of the table, by its names.
KERNELS = {
    "forward": forward_kernel,
    "grad_query": grad_query_kernel,
    "grad_key_value": grad_key_value_kernel,
    "write_states": write_states_kernel,
}


def power_of_two(n: int) -> int:
    """The power of two that holds n, and at least the 16 that a matrix product takes."""
    return max(16, triton.next_power_of_2(n))


def blocks_of(kernel: str, element: int, head: int) -> Blocks:
    """The first row of the table that holds the head, for so many bytes per element."""
    rows = BLOCKS[kernel].items()
    return next(row for (size, largest), row in rows if size == element and head <= largest)


class FusedInputs(NamedTuple):
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


class FusedCall:
    """Sizes, prefix sums and launches that the two passes share."""

    def __init__(self, inputs: FusedInputs):
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
        return min(1024, power_of_two(self.chunk))

    def launch(self, name: str, *args, states=None, **options) -> None:
        """One of the three kernels that compute a chunk block by block."""
        blocks = blocks_of(name, self.element, max(self.head, self.value_head))
        slices = min(blocks.slices, power_of_two(max(self.head, self.value_head)))
        strides = (0, 0, 0) if states is None else self.states_strides(states)
        KERNELS[name][(self.rows * self.count * triton.cdiv(self.chunk, blocks.rows),)](
            *args, *self.sums_strides, *strides,
            heads=self.heads, length=self.length, chunk=self.chunk, scale=self.scale,
            D=self.head, DV=self.value_head, BLOCK_D=power_of_two(self.head),
            BLOCK_V=power_of_two(self.value_head), BLOCK_M=blocks.rows, BLOCK_N=blocks.columns,
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
        tile_d = min(power_of_two(self.head), blocks.slices)
        tile_v = min(power_of_two(self.value_head), blocks.columns)
        tiles = triton.cdiv(self.head, tile_d) * triton.cdiv(self.value_head, tile_v)
        shape = self.rows, self.sides, self.count, self.elements
        states = x.new_empty(shape, dtype=torch.float32)
        KERNELS["write_states"][(self.rows * self.count * tiles,)](
            x, y, states, self.sums, self.totals, *self.or_none(self.mask, divisor, delta),
            *x.stride(), *y.stride(), *self.sums_strides, *states.stride()[:3],
            scale=self.scale, heads=self.heads, length=self.length, chunk=self.chunk,
            D=self.head, DV=self.value_head, BLOCK_D=tile_d, BLOCK_V=tile_v, BLOCK=blocks.rows,
            DECAY=self.orders > 0, NORMALIZE=self.normalize, MASKED=self.mask is not None,
            BACKWARD=backward, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        if not self.orders:
            return states.sum(2, keepdim=True)
        block = min(256, power_of_two(self.elements))
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


def launch_features(
    x: torch.Tensor,
    grad: torch.Tensor | None,
    mask: torch.Tensor | None,
    name: str,
    result: torch.Tensor,
) -> None:
    """Writes the result of `lion_triton.fused_features`."""
    batch, heads, length, head = x.shape
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


def launch_recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left_to_right: torch.Tensor | None,
    right_to_left: torch.Tensor | None,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Writes the output of `lion_triton.fused_recurrent`."""
    batch, heads, length, head = query.shape
    value_head = value.shape[-1]
    edges = [query, query]
    if left_to_right is not None and right_to_left is not None:
        edges = [x.expand(batch, heads, length) for x in (left_to_right, right_to_left)]
    columns = min(power_of_two(value_head), max(16, STATE_SIZE // power_of_two(head)))
    strides = [s for x in (query, key, value, output) for s in x.stride()]
    with torch.cuda.device_of(value):
        recurrent_kernel[(batch * heads * triton.cdiv(value_head, columns),)](
            query, key, value, output, *edges, *strides,
            *edges[0].stride()[:3], *edges[1].stride()[:3], scale=scale, heads=heads, length=length,
            D=head, DV=value_head, BLOCK_D=power_of_two(head), BLOCK_V=columns,
            DECAY=left_to_right is not None,
        )  # fmt: skip
