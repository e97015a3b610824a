"""A short depthwise convolution that sees neither padding nor the neighbouring document.

Legend: B rows, L places of a row, C channels, W width of the kernel, T tokens that are not padding.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_lion import LionConfig
from .lion_checks import values_known


class SpacedRows(NamedTuple):
    """Tokens moved together, with W // 2 zeros between documents: a plain convolution serves them.

    Fields:
        tokens: the tokens' places in the flattened batch, (T,).
        places: their places in the flattened spaced rows, (T,).
        length: places of a spaced row.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    length: int


class Neighbours(NamedTuple):
    """For every offset of the kernel, where a token's neighbour stands, and whether there is one.

    Fields:
        places: within the row, (W, B, L).
        valid: whether the neighbour is a token of the same document, (W, B, L).
    """

    places: torch.Tensor
    valid: torch.Tensor


class Grid(NamedTuple):
    """The patches of an image, which follow its class token row by row."""

    rows: int
    columns: int


def convolution_layout(
    width: int,
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> SpacedRows | Neighbours | None:
    """What a convolution has to know of a batch of texts, made once for all layers.

    Args:
        width: W, tokens that the kernel covers.
        shape: (B, L).
        attention_mask: (B, L), nonzero for tokens.
        seq_idx: (B or 1, L), documents.

    Returns:
        None if every row is one document without padding. `SpacedRows` where the values of the mask
        may be looked at, which is faster, else `Neighbours`.
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
    documents = _documents(mask, seq_idx)
    if values_known(mask):
        return _spaced_rows(width // 2, mask, rank, documents)
    return _neighbours(width, mask, rank, documents)


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
) -> SpacedRows:
    tokens = mask.flatten().nonzero().squeeze(1)
    places = rank + gap * documents
    length = int(places.max()) + 1 if places.numel() else 1
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None] * max(length, 1)
    return SpacedRows(tokens, (places + rows).flatten()[tokens], max(length, 1))


def _neighbours(
    width: int, mask: torch.Tensor, rank: torch.Tensor, documents: torch.Tensor
) -> Neighbours:
    length = mask.shape[1]
    slots = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # places of the tokens, by rank
    index, valid = [], []
    for offset in range(-(width // 2), width // 2 + 1):
        wanted = rank + offset
        there = slots.gather(1, wanted.clamp(0, length - 1))
        inside = (wanted >= 0) & (wanted < mask.sum(1, keepdim=True))
        index.append(there)
        valid.append(mask & inside & (documents.gather(1, there) == documents))
    return Neighbours(torch.stack(index), torch.stack(valid))


Layout = Grid | SpacedRows | Neighbours | None


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
            layout: where the neighbours are: a `Grid` for images, for texts what
                `convolution_layout` returns.

        Raises:
            ValueError: for an image without a grid.
        """
        if isinstance(layout, Grid):
            cls_token, patches = hidden_states[:, :1], hidden_states[:, 1:].unflatten(1, layout)
            return torch.cat([cls_token, self._convolve(patches).flatten(1, 2)], dim=1)
        if self.weight.shape[2] > 1:
            raise ValueError(f"conv_layout={layout!r}: expected the Grid of the image's patches")
        if layout is None:
            return self._convolve(hidden_states[:, None]).squeeze(1)
        if isinstance(layout, SpacedRows):
            return self._convolve_spaced(hidden_states, layout)
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

    def _convolve_spaced(self, hidden_states: torch.Tensor, layout: SpacedRows) -> torch.Tensor:
        batch, length, channels = hidden_states.shape
        flat = hidden_states.reshape(batch * length, channels)
        spaced = flat.new_zeros(batch * layout.length, channels)
        spaced = spaced.index_copy(0, layout.places, flat.index_select(0, layout.tokens))
        spaced = self._convolve(spaced.view(batch, 1, layout.length, channels))
        answers = spaced.reshape(batch * layout.length, channels).index_select(0, layout.places)
        output = torch.zeros_like(flat).index_copy(0, layout.tokens, answers)
        return output.view(batch, length, channels)
