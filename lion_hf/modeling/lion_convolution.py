"""A short depthwise convolution that sees neither padding nor the neighbouring document.

Legend: B rows, L places of a row, C channels, W width of the kernel, T tokens that are not padding.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_lion import LionConfig
from .lion_checks import values_known


class SpacedPlanes(NamedTuple):
    """Tokens moved together, with W // 2 zeros between documents: plain convolutions serve them.

    Fields:
        tokens: the tokens' places in the flattened batch, (T,).
        places: their places in the flattened planes, which follow each other, (T,).
        planes: batch, rows and columns of each plane.
        others_stay: whether the batch's other places stay as they are, as class tokens do, or
            become zeros.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    planes: tuple[tuple[int, int, int], ...]
    others_stay: bool = False


class Neighbours(NamedTuple):
    """For every offset of the kernel, where a token's neighbour stands, and whether there is one.

    Fields:
        places: within the row, (W, B, L).
        valid: whether the neighbour is a token of the same document, (W, B, L).
    """

    places: torch.Tensor
    valid: torch.Tensor


class CompactRows(NamedTuple):
    """The tokens of every row moved to its front, for rows whose values cannot be looked at.

    Fields:
        tokens: the places in the flattened batch that the front of each row reads, (B * L,).
        back: for every place of the batch, where its token went, (B * L,).
        filled: True for the places that got a token, (B, L, 1).
        mask: True for tokens, (B, L, 1).
    """

    tokens: torch.Tensor
    back: torch.Tensor
    filled: torch.Tensor
    mask: torch.Tensor


class Grid(NamedTuple):
    """The patches of an image, which follow its class token row by row."""

    rows: int
    columns: int


def convolution_layout(
    width: int,
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> SpacedPlanes | CompactRows | Neighbours | None:
    """What a convolution has to know of a batch of texts, made once for all layers.

    Args:
        width: W, tokens that the kernel covers.
        shape: (B, L).
        attention_mask: (B, L), nonzero for tokens.
        seq_idx: (B or 1, L), documents.

    Returns:
        None if every row is one document without padding. `SpacedPlanes` where the values of the
        mask may be looked at, which is faster, else `CompactRows` for one document per row, and
        `Neighbours` for several.
    """
    if attention_mask is None and seq_idx is None:
        return None
    if attention_mask is None:
        assert seq_idx is not None  # one of the two is given
        device = seq_idx.device
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        mask = attention_mask != 0
        if seq_idx is None and values_known(mask) and bool(mask.all()):
            return None
    rank = mask.cumsum(1) - 1  # of a token among the tokens of its row
    if values_known(mask):
        return _spaced_rows(width // 2, mask, rank, _documents(mask, seq_idx))
    if seq_idx is None:
        return _compact_rows(mask, rank)
    return _neighbours(width, mask, rank, _documents(mask, seq_idx))


def _documents(mask: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
    """Numbers of the documents of a row from 0 on, (B, L); what stands at padding is not read."""
    if seq_idx is None:
        return torch.zeros_like(mask, dtype=torch.long)
    seq_idx = seq_idx.expand(mask.shape)
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).cummax(1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)  # the last token before this place
    new = mask & (before >= 0) & (seq_idx.gather(1, before.clamp(min=0)) != seq_idx)
    return new.cumsum(1)


def _spaced_rows(
    gap: int, mask: torch.Tensor, rank: torch.Tensor, documents: torch.Tensor
) -> SpacedPlanes:
    tokens = mask.flatten().nonzero().squeeze(1)
    places = rank + gap * documents
    length = int(places.max()) + 1 if places.numel() else 1
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None] * max(length, 1)
    plane = (mask.shape[0], 1, max(length, 1))
    return SpacedPlanes(tokens, (places + rows).flatten()[tokens], (plane,))


def packed_layout(
    width: int, grids: Sequence[tuple[int, int]], device: torch.device | None = None
) -> SpacedPlanes:
    """What a convolution has to know of images packed into one row, each behind its class token.

    Images of equally many columns stand below each other in one plane.

    Args:
        width: W, patches that the kernel covers in both directions.
        grids: rows and columns of patches of each image.
        device: where the row is.
    """
    columns_of = torch.tensor([columns for _, columns in grids])
    sizes = [rows * columns for rows, columns in grids]
    # an image's first patch, behind the class tokens up to its own
    first = [1, *(n + 2 + patches for n, patches in enumerate(accumulate(sizes)))]
    tokens, places, planes, before = [], [], [], 0
    for columns in columns_of.unique().tolist():
        height = 0
        for n in (columns_of == columns).nonzero().flatten().tolist():
            patches = torch.arange(sizes[n], device=device)
            tokens.append(patches + first[n])
            places.append(patches + before + height * columns)
            height += grids[n][0] + width // 2
        planes.append((1, height, columns))
        before += height * columns
    return SpacedPlanes(torch.cat(tokens), torch.cat(places), tuple(planes), others_stay=True)


def _slots(mask: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Places of a row's tokens, by rank, and 0 behind the last, (B, L). ONNX cannot sort stably."""
    length = mask.shape[1]
    places = torch.arange(length, device=mask.device).expand(mask.shape)
    slots = places.new_zeros(mask.shape[0], length + 1)  # the last one takes what padding writes
    return slots.scatter(1, torch.where(mask, rank, length), places)[:, :length]


def _compact_rows(mask: torch.Tensor, rank: torch.Tensor) -> CompactRows:
    batch, length = mask.shape
    first = torch.arange(batch, device=mask.device)[:, None] * length  # place of each row
    filled = torch.arange(length, device=mask.device) < mask.sum(1, keepdim=True)
    tokens, back = first + _slots(mask, rank), first + rank.clamp(min=0)
    return CompactRows(tokens.flatten(), back.flatten(), filled[..., None], mask[..., None])


def _neighbours(
    width: int, mask: torch.Tensor, rank: torch.Tensor, documents: torch.Tensor
) -> Neighbours:
    length = mask.shape[1]
    slots = _slots(mask, rank)
    index, valid = [], []
    for offset in range(-(width // 2), width // 2 + 1):
        wanted = rank + offset
        there = slots.gather(1, wanted.clamp(0, length - 1))
        inside = (wanted >= 0) & (wanted < mask.sum(1, keepdim=True))
        index.append(there)
        valid.append(mask & inside & (documents.gather(1, there) == documents))
    return Neighbours(torch.stack(index), torch.stack(valid))


Layout = Grid | SpacedPlanes | CompactRows | Neighbours | None


class LionConvolution(nn.Module):
    """Depthwise convolution over neighbouring tokens of a text or patches of an image.

    It starts as the identity. Rows with padding or several documents give what each document gives
    alone. The class token of an image has no neighbours and stays as it is; the patches are
    neighbours as they lie in the image, whatever the patch order.

    Args:
        config: gives the number of channels, the width of the kernel, and the modality.
    """

    def __init__(self, config: LionConfig):
        super().__init__()
        width = config.conv_kernel_size
        assert width is not None  # a model without convolutions has none of these
        height = 1 if config.modality == "text" else width
        self.weight = nn.Parameter(torch.empty(config.hidden_size, 1, height, width))
        with torch.no_grad():
            self.weight.copy_(self.identity())

    def identity(self) -> torch.Tensor:
        """The weight with which every token stays as it is."""
        weight = torch.zeros_like(self.weight)
        weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = 1
        return weight

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: Layout = None,
    ) -> torch.Tensor:
        """Convolves (B, L, C).

        Args:
            hidden_states: (B, L, C).
            layout: where the neighbours are: a `Grid` for images, for packed ones what
                `packed_layout` returns, for texts what `convolution_layout` returns.

        Raises:
            ValueError: for images without a layout of theirs.
        """
        if isinstance(layout, Grid):
            cls_token, patches = hidden_states[:, :1], hidden_states[:, 1:].unflatten(1, layout)
            return torch.cat([cls_token, self._convolve(patches).flatten(1, 2)], dim=1)
        if isinstance(layout, SpacedPlanes):
            return self._convolve_spaced(hidden_states, layout)
        if self.weight.shape[2] > 1:
            raise ValueError(f"conv_layout={layout!r}: expected the Grid of the image's patches")
        if layout is None:
            return self._convolve(hidden_states[:, None]).squeeze(1)
        if isinstance(layout, CompactRows):
            return self._convolve_compact(hidden_states, layout)
        taps = self.weight[:, 0, 0].to(hidden_states.dtype).unbind(1)
        output = torch.zeros_like(hidden_states)
        for tap, places, valid in zip(taps, layout.places, layout.valid):
            places = places[..., None].expand_as(hidden_states)
            neighbour = hidden_states.gather(1, places).masked_fill(~valid[..., None], 0)
            output = output + neighbour * tap
        return output

    def _convolve(self, planes: torch.Tensor) -> torch.Tensor:
        """Convolves (B, rows, columns, C), which costs no copy, and torch is fastest with it."""
        weight = self.weight.to(planes.dtype)
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        planes = planes.permute(0, 3, 1, 2)
        return F.conv2d(planes, weight, padding=padding, groups=weight.shape[0]).permute(0, 2, 3, 1)

    def _convolve_spaced(self, hidden_states: torch.Tensor, layout: SpacedPlanes) -> torch.Tensor:
        channels = hidden_states.shape[-1]
        flat = hidden_states.reshape(-1, channels)
        sizes = [batch * rows * columns for batch, rows, columns in layout.planes]
        spaced = flat.new_zeros(sum(sizes), channels)
        spaced = spaced.index_copy(0, layout.places, flat.index_select(0, layout.tokens))
        planes = [
            self._convolve(plane.view(*shape, channels)).reshape(-1, channels)
            for plane, shape in zip(spaced.split(sizes), layout.planes)
        ]
        spaced = planes[0] if len(planes) == 1 else torch.cat(planes)
        answers = spaced.index_select(0, layout.places)
        others = flat if layout.others_stay else torch.zeros_like(flat)
        return others.index_copy(0, layout.tokens, answers).view(hidden_states.shape)

    def _convolve_compact(self, hidden_states: torch.Tensor, layout: CompactRows) -> torch.Tensor:
        """Shifted rows times taps, which ONNX Runtime computes without transposing anything."""
        shape, length = hidden_states.shape, hidden_states.shape[1]
        front = hidden_states.flatten(0, 1).index_select(0, layout.tokens).view(shape)
        taps = self.weight[:, 0, 0].to(hidden_states.dtype).unbind(1)
        gap = len(taps) // 2
        front = F.pad(front.masked_fill(~layout.filled, 0), (0, 0, gap, gap))
        output = torch.zeros_like(hidden_states)
        for n, tap in enumerate(taps):
            output = output + tap * front[:, n : n + length]
        output = output.flatten(0, 1).index_select(0, layout.back).view(shape)
        return output.masked_fill(~layout.mask, 0)
