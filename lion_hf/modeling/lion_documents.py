"""Rows of short documents on a CPU: each document becomes a row of its own.

A row that packs many short documents would be read chunk after chunk. Documents of about the same
length are instead laid out as rows of a batch, each with its own orders of reading, and every
batch is read at once. Only the operation sees this layout.

Legend: T tokens, P places in all batches, K orders of reading; B, H, L and D as in lion_request.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .lion_choice import default_chunk_size
from .lion_numerics import LOG_ZERO, plainly_on_cpu
from .lion_packing import first_tokens
from .lion_request import AttentionRequest, Directions, edges_of

# A batch takes documents down to this share of its longest, or shorter by this many tokens.
LEAST_SHARE, SMALL_GAP = 7 / 8, 8


class Move(NamedTuple):
    """Where each row of the result comes from, and which of them are empty."""

    source: torch.Tensor
    empty: torch.Tensor | None


class _Gather(torch.autograd.Function):
    """Moves the rows of a matrix. Its gradient moves them back, without sums."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, there: Move, back: Move) -> torch.Tensor:
        ctx.moves = back, there
        moved = x.index_select(0, there.source)
        return moved if there.empty is None else moved.index_fill(0, there.empty, 0)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _Gather.apply(grad, *ctx.moves), None, None


class DocumentRows(NamedTuple):
    """How the documents of a request are laid out."""

    shapes: list[tuple[int, int]]  # rows and places per row of each batch
    tokens: tuple[Move, Move]  # from the tokens to the places, and back
    edges: list[tuple[Move, Move]]  # likewise of what is in reading order, for each order
    orders: torch.Tensor | None  # the token of its document that each place reads, (K, P)
    ends: torch.Tensor  # a document's last place: the edge behind it is cut, (P,)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The batches of (P, any), each (rows, places per row, any)."""
        parts = x.split([rows * places for rows, places in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes)]


def batches_of(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of about the same length together: their numbers, the longest first."""
    batches: list[list[int]] = []
    longest = 0
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or lengths[n] < min(LEAST_SHARE * longest, longest - SMALL_GAP):
            batches.append([])
            longest = lengths[n]
        batches[-1].append(n)
    return batches


def document_rows(request: AttentionRequest) -> DocumentRows | None:
    """The layout for a request in the chunk form, or None where it does not pay or serve.

    It pays if the documents fit into one chunk on average, and serves where there is neither
    padding nor a need for weights, and where values may be looked at.
    """
    seq_idx, edges = request.seq_idx, edges_of(request.directions)
    if seq_idx is None or request.mask is not None or request.need_weights:
        return None
    tensors = request.query, request.key, request.value
    if not plainly_on_cpu(*tensors, *edges, seq_idx) or not all(x.numel() for x in tensors):
        return None
    batch, length = request.query.shape[0], request.query.shape[2]
    first = first_tokens(seq_idx).expand(batch, length).flatten()
    starts = first.nonzero().squeeze(1)
    chunk, _ = default_chunk_size(1, "cpu")  # the longest row of one chunk
    if len(starts) == batch or batch * length > len(starts) * chunk:
        return None
    return _lay_out(request, first.cumsum(0) - 1, starts)


def _lay_out(
    request: AttentionRequest, documents: torch.Tensor, starts: torch.Tensor
) -> DocumentRows:
    """The layout for the documents' numbers (T,) and first tokens."""
    total = len(documents)
    lengths = documents.bincount()
    counts = lengths.tolist()
    batches = batches_of(counts)
    shapes = [(len(batch), counts[batch[0]]) for batch in batches]
    # for every place its document, and its number in it
    numbers = [torch.arange(places).repeat(rows) for rows, places in shapes]
    place = torch.cat(numbers)
    owners = [
        torch.tensor(batch).repeat_interleave(places) for batch, (_, places) in zip(batches, shapes)
    ]
    owner = torch.cat(owners)
    padding = place >= lengths[owner]
    filled, empty = (~padding).nonzero().squeeze(1), padding.nonzero().squeeze(1)

    def moves(starts: torch.Tensor) -> tuple[Move, Move]:
        index = (starts[owner] + place).masked_fill(padding, 0)
        back = torch.empty(total, dtype=torch.long)
        back[index[filled]] = filled
        return Move(index, empty if len(empty) else None), Move(back, None)

    tokens = moves(starts)
    edges, orders = [], []
    for order, *_ in request.directions:
        if order is None:
            edges.append(tokens)
            continue
        rows = torch.arange(0, total, len(order))[:, None]
        order = (order + rows).flatten()  # of all rows of the request, one behind the other
        read = documents[order]
        steps = (read[1:] != read[:-1]).nonzero().squeeze(1) + 1
        steps = torch.cat([steps.new_zeros(1), steps])
        edges.append(moves(torch.empty_like(steps).index_copy_(0, read[steps], steps)))
        read_token = order[edges[-1][0].source] - starts[owner]
        orders.append(torch.where(padding, place, read_token))
    ends = place == lengths[owner] - 1
    return DocumentRows(shapes, tokens, edges, torch.stack(orders) if orders else None, ends)


def run_documents(
    form: Callable[[AttentionRequest], torch.Tensor], request: AttentionRequest, rows: DocumentRows
) -> torch.Tensor:
    """A form on the batches, (B, H, L, Dv) in the type that the form returns."""
    query, heads = request.query, request.query.shape[1]
    operands = [
        [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in rows.split(moved)]
        for moved in (
            _Gather.apply(x.transpose(1, 2).flatten(0, 1).flatten(1), *rows.tokens)
            for x in (request.query, request.key, request.value)
        )
    ]
    directions = _directions(request, rows)
    outputs = []
    for n, (query, key, value) in enumerate(zip(*operands)):
        batch = request._replace(
            query=query, key=key, value=value, directions=directions[n], seq_idx=None
        )
        outputs.append(form(batch).transpose(1, 2).flatten(0, 1).flatten(1))
    there, back = rows.tokens
    output = _Gather.apply(torch.cat(outputs), back, there)
    shape = request.value.transpose(1, 2).shape
    return output.view(shape).transpose(1, 2)


def _directions(request: AttentionRequest, rows: DocumentRows) -> list[tuple[Directions, ...]]:
    """The orders of reading of each batch, and its decays, cut behind every document."""
    batch, _, length, _ = request.query.shape
    found: list[list[Directions]] = [[] for _ in rows.shapes]
    for k, (_, *both) in enumerate(request.directions):
        edges = []
        for x in both:
            assert x is not None  # documents are kept apart by decays
            x = x.expand(batch, -1, length).transpose(1, 2).flatten(0, 1)
            moved = _Gather.apply(x, *rows.edges[k])
            moved = moved.masked_fill(rows.ends[:, None], LOG_ZERO[x.dtype])
            edges.append([part.transpose(1, 2) for part in rows.split(moved)])
        orders: Sequence[torch.Tensor | None] = [None] * len(found)
        if rows.orders is not None:
            orders = rows.split(rows.orders[k])
        for directions, *one in zip(found, orders, *edges):
            directions.append(Directions(*one))
    return [tuple(directions) for directions in found]
