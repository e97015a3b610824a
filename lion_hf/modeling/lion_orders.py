"""Orders in which LION reads the patches of an image."""

from collections.abc import Callable, Sequence

import torch

from .configuration_lion import LionConfig


def snake_orders(
    rows: int, columns: int, num_prefix_tokens: int = 1, device: torch.device | None = None
) -> torch.Tensor:
    """The two S-curves over a grid of patches: rows back and forth, and columns back and forth.

    Args:
        rows: number of patches from top to bottom.
        columns: number of patches from left to right.
        num_prefix_tokens: tokens before the patches (the class token), first in both orders.
        device: where to build the orders.

    Returns:
        (2, num_prefix_tokens + rows * columns), int64. Entry [k, t] is the token that curve k reads
        at step t, with patches numbered row by row.

    Raises:
        ValueError: for numbers that are not integers, or too small.
    """
    sizes = (
        ("rows", rows, 1),
        ("columns", columns, 1),
        ("num_prefix_tokens", num_prefix_tokens, 0),
    )
    for name, n, least in sizes:
        if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool) or n < least:
            raise ValueError(f"{name}={n!r}: expected an integer of at least {least}")
    grid = torch.arange(rows * columns, device=device).view(rows, columns)
    row_is_odd = torch.arange(rows, device=device)[:, None] % 2 == 1
    column_is_odd = torch.arange(columns, device=device)[None, :] % 2 == 1
    by_rows = torch.where(row_is_odd, grid.flip(1), grid).flatten()
    by_columns = torch.where(column_is_odd, grid.flip(0), grid).T.flatten()
    prefix = torch.arange(num_prefix_tokens, device=device).expand(2, -1)
    return torch.cat([prefix, torch.stack([by_rows, by_columns]) + num_prefix_tokens], dim=1)


# Patch order -> its curves, as many as `CURVES` says, by a function with the arguments of
# `snake_orders`; None for the patches as they stand.
ORDERS: dict[str, Callable[..., torch.Tensor] | None] = {"raster": None, "snake": snake_orders}


def reading_orders(
    config: LionConfig, rows: int, columns: int, device: torch.device | None = None
) -> torch.Tensor | None:
    """The curves along which a model reads a grid of patches behind one class token.

    Args:
        config: the model's configuration.
        rows: number of patches from top to bottom.
        columns: number of patches from left to right.
        device: where to build the orders.

    Returns:
        (curves, 1 + rows * columns) as `snake_orders`, or None where tokens are read as they stand.
    """
    curves = ORDERS[config.patch_order]
    if curves is None or config.mask_type == "lit":  # without decay every order gives the same
        return None
    return curves(rows, columns, device=device)


def packed_orders(
    config: LionConfig, grids: Sequence[tuple[int, int]], device: torch.device | None = None
) -> torch.Tensor | None:
    """The curves over a row of images, one behind the other, each along its own curves.

    Args:
        config: the model's configuration.
        grids: rows and columns of patches of each image, which has a class token before them.
        device: where to build the orders.

    Returns:
        (curves, tokens of all images), or None where tokens are read as they stand.
    """
    orders = {grid: reading_orders(config, *grid, device=device) for grid in set(grids)}
    packed, before = [], 0
    for grid in grids:
        order = orders[grid]
        if order is None:
            return None
        packed.append(order + before)
        before += order.shape[1]
    return torch.cat(packed, dim=1)
