"""From token ids or pixels to the first hidden states."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .configuration_lion import LionConfig
from .lion_checks import check_ids, check_integers, check_tensors
from .lion_convolution import Grid
from .lion_numerics import has_values
from .lion_orders import reading_orders
from .lion_packing import first_tokens


def default_positions(
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Positions of the tokens within their documents, not counting padding, (B or 1, L)."""
    batch, length = shape
    if attention_mask is None and seq_idx is None:
        return torch.arange(length, device=device)[None]
    if attention_mask is None:
        tokens = torch.ones(batch, length, dtype=torch.long, device=device)
    else:
        tokens = (attention_mask != 0).long()
    before = tokens.cumsum(-1) - tokens
    if seq_idx is not None:
        before = before - torch.where(first_tokens(seq_idx), before, 0).cummax(-1).values
    return before


class LionTextEmbeddings(nn.Module):
    """Word, token-type and (optionally) position embeddings of BERT."""

    def __init__(self, config: LionConfig):
        super().__init__()
        size, padding = config.hidden_size, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=padding)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.position_embeddings = None
        if config.use_position_embeddings:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids, token_type_ids, position_ids, inputs_embeds, attention_mask, seq_idx
    ) -> torch.Tensor:
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.word_embeddings, "vocab_size")
            embeddings = self.word_embeddings(input_ids)
        else:
            embeddings = inputs_embeds.to(self.token_type_embeddings.weight.dtype)
        shape = embeddings.shape[:2]
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, shape[1], dtype=torch.long, device=embeddings.device)
        else:
            types = self.token_type_embeddings
            check_ids("token_type_ids", token_type_ids, types, "type_vocab_size")
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = default_positions(shape, attention_mask, seq_idx, embeddings.device)
            table = self.position_embeddings
            check_ids("positions", position_ids, table, "max_position_embeddings")
            embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.norm(embeddings))


class PackedImages(NamedTuple):
    """Images packed into one row, one behind the other, each a class token and its patches.

    Fields:
        hidden_states: their first hidden states, (1, T, hidden).
        seq_idx: the image of each token, (1, T).
        not_finite: tokens of images with pixels that are not finite, (1, T, 1); None if all are.
    """

    hidden_states: torch.Tensor
    seq_idx: torch.Tensor
    not_finite: torch.Tensor | None


class LionImageEmbeddings(nn.Module):
    """Class token, patches and (optionally) position embeddings of ViT.

    They serve any height and width that the patch divides, and images of different sizes together,
    as patches.
    """

    def __init__(self, config: LionConfig, use_mask_token: bool = False):
        super().__init__()
        self.patch_size, self.num_channels = config.patch_size, config.num_channels
        self.config = config
        size, patch = config.hidden_size, config.patch_size
        # rows and columns in training
        self.grid = tuple(side // patch for side in config.image_height_width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size)) if use_mask_token else None
        self.position_embeddings = None
        if config.use_position_embeddings:
            positions = torch.zeros(1, self.grid[0] * self.grid[1] + 1, size)
            self.position_embeddings = nn.Parameter(positions)
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, size, kernel_size=patch, stride=patch
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def patch_grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches of a batch of images, (B, channels, height, width)."""
        check_tensors(pixel_values=pixel_values)
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}: expected real numbers, as an image"
                " processor makes them"
            )
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)}: expected"
                f" (batch, {self.num_channels}, height, width), or patches with spatial_shapes"
            )
        height, width, size = *pixel_values.shape[2:], self.patch_size
        if min(height, width) < size or height % size or width % size:
            raise ValueError(
                f"image of {height} x {width} pixels: expected multiples of patch_size={size}"
            )
        return height // size, width // size

    def reading_orders(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """The curves over the tokens of a batch of images, or None for the tokens as they stand."""
        return reading_orders(self.config, *self.patch_grid(pixel_values), pixel_values.device)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """Position embeddings for a grid, (1, 1 + rows * columns, hidden).

        For another grid than that of training they are interpolated (bicubic).
        """
        # an exported program for any size is not tied to one
        known = statically_known_true if torch.compiler.is_exporting() else bool
        learned = self.position_embeddings
        assert learned is not None  # asked for only where the model learns positions
        if all(known(size == trained) for size, trained in zip((rows, columns), self.grid)):
            return learned
        first, patches = learned.split((1, self.grid[0] * self.grid[1]), dim=1)
        patches = patches.float().unflatten(1, self.grid).permute(0, 3, 1, 2)
        size = (rows, columns)
        patches = F.interpolate(patches, size=size, mode="bicubic", align_corners=False)
        return torch.cat([first, patches.flatten(2).mT.to(first.dtype)], dim=1)

    def packed_grids(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor) -> list[Grid]:
        """Rows and columns of each of the images that come as patches.

        Raises:
            ValueError: for patches or shapes that do not fit together or the model.
        """
        check_tensors(pixel_values=pixel_values)
        check_tensors(spatial_shapes=spatial_shapes)  # may be on another device
        check_integers("spatial_shapes", spatial_shapes)
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2 or not len(spatial_shapes):
            raise ValueError(
                f"spatial_shapes {tuple(spatial_shapes.shape)}: expected (images, 2), the rows and"
                " columns of patches of each image"
            )
        numbers = self.patch_size**2 * self.num_channels
        real = pixel_values.is_floating_point()
        if not real or pixel_values.dim() != 2 or pixel_values.shape[1] != numbers:
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} of {pixel_values.dtype} with"
                f" spatial_shapes: expected real numbers, (patches, patch_size * patch_size *"
                f" channels) = (patches, {numbers})"
            )
        if not has_values(spatial_shapes):
            raise ValueError(
                "spatial_shapes is traced: expected values, because the images' shapes decide what"
                " is computed; export or compile the model for images of one size"
            )
        grids = [Grid(*shape) for shape in spatial_shapes.tolist()]
        smallest, patches = min(map(min, grids)), sum(rows * columns for rows, columns in grids)
        if smallest < 1:
            raise ValueError(f"spatial_shapes has {smallest}: expected integers of at least 1")
        if patches != len(pixel_values):
            raise ValueError(
                f"spatial_shapes of {patches} patches with pixel_values of {len(pixel_values)}:"
                " expected as many"
            )
        return grids

    def pack(self, pixel_values: torch.Tensor, grids: Sequence[Grid]) -> PackedImages:
        """Embeds the patches of images of different sizes, each with positions of its own.

        An image whose patch embeddings are not finite is read as zeros, so that it does not reach
        the others.
        """
        sizes = [rows * columns for rows, columns in grids]
        device = pixel_values.device
        images = torch.arange(len(grids), device=device)
        seq_idx = images.repeat_interleave(torch.tensor([1 + n for n in sizes], device=device))
        pixel_values = pixel_values.to(self.patch_embeddings.weight.dtype)
        embeddings = self._embed_patches(pixel_values)
        finite = embeddings.isfinite().all(1).split(sizes)
        of_images = ~torch.stack([patches.all() for patches in finite])
        not_finite = None
        if of_images.any():
            not_finite = of_images[seq_idx][None, :, None]
            patches = images.repeat_interleave(torch.tensor(sizes, device=device))
            embeddings = self._embed_patches(pixel_values.masked_fill(of_images[patches, None], 0))
        cls_token = self.cls_token[0].to(embeddings.dtype)
        positions: dict[Grid, torch.Tensor] = {}
        if self.position_embeddings is not None:
            positions = {grid: self.positions(*grid)[0] for grid in set(grids)}
        packed = []
        for grid, patches in zip(grids, embeddings.split(sizes)):
            image = torch.cat([cls_token, patches])
            packed.append(image + positions[grid] if positions else image)
        return PackedImages(self.dropout(torch.cat(packed))[None], seq_idx[None], not_finite)

    def _embed_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """The patch embeddings of (patches, patch_size * patch_size * channels)."""
        module, size = self.patch_embeddings, self.patch_size
        changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if type(module) is nn.Conv2d and not changed:  # as a product, in a third of the time
            return F.linear(patches, module.weight.permute(0, 2, 3, 1).flatten(1), module.bias)
        return module(patches.unflatten(1, (size, size, -1)).permute(0, 3, 1, 2)).flatten(1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None,
        grids: Sequence[Grid] | None = None,
    ) -> torch.Tensor | PackedImages:
        """Embeds images of one size, (B, channels, height, width) to (B, tokens, hidden).

        With `grids`, those of `packed_grids`, it embeds images of different sizes: `pixel_values`
        are then the patches of all, (patches, patch_size * patch_size * channels), row by row, with
        the channels of a pixel side by side.
        """
        if grids is not None:
            return self.pack(pixel_values, grids)
        rows, columns = self.patch_grid(pixel_values)
        pixels = pixel_values.to(self.patch_embeddings.weight.dtype)
        embeddings = self.patch_embeddings(pixels).flatten(2).mT
        check_tensors(pixel_values.device, bool_masked_pos=bool_masked_pos)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError(
                    "bool_masked_pos in a model without mask token: build it with"
                    " use_mask_token=True"
                )
            if bool_masked_pos.shape != embeddings.shape[:2]:
                expected = tuple(embeddings.shape[:2])
                raise ValueError(
                    f"bool_masked_pos {tuple(bool_masked_pos.shape)}: expected (batch, patches) ="
                    f" {expected}"
                )
            mask_token = self.mask_token.to(embeddings.dtype)
            embeddings = torch.where(bool_masked_pos[..., None].bool(), mask_token, embeddings)
        cls_tokens = self.cls_token.expand(embeddings.shape[0], -1, -1).to(embeddings.dtype)
        embeddings = torch.cat([cls_tokens, embeddings], dim=1)
        if self.position_embeddings is not None:
            embeddings = embeddings + self.positions(rows, columns)
        return self.dropout(embeddings)


def resize_images(model: Any, image_size: int | list[int]) -> None:
    """Changes the image size of a model; its position embeddings are interpolated to the new grid.

    Args:
        model: an image model with a LION encoder, changed in place.
        image_size: height and width in pixels, one integer or a pair.

    Raises:
        ValueError: if the patch does not divide the size.
    """
    config, embeddings = model.config, model.lion.embeddings
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = config.patch_size
    if min(height, width) < 1 or height % size or width % size:
        raise ValueError(f"image size {image_size}: expected multiples of patch_size={size}")
    grid = (height // size, width // size)
    config.image_size = height if height == width else [height, width]
    old = embeddings.position_embeddings
    if old is not None and grid != embeddings.grid:
        positions = embeddings.positions(*grid).detach().contiguous()
        embeddings.position_embeddings = nn.Parameter(positions, requires_grad=old.requires_grad)
    embeddings.grid = grid
