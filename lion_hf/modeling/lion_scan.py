"""Orders in which LION reads the patches of an image."""

import torch

PATCH_ORDERS = ("raster", "snake")


def snake_orders(rows: int, columns: int, num_prefix_tokens: int = 1, device: torch.device | None = None) -> torch.Tensor:
    """The two S-curves over a grid of patches: rows back and forth, and columns back and forth.

    Args:
        rows: patches from top to bottom.
        columns: patches from left to right.
        num_prefix_tokens: tokens before the patches (the class token), first in both orders.
        device: where to build them.

    Returns:
        (2, num_prefix_tokens + rows * columns), int64: entry [k, t] is the token that curve k reads at step t, with
        patches numbered row by row.

    Raises:
        ValueError: for numbers that are no integers, or too small.
    """
    for name, n, least in (("rows", rows, 1), ("columns", columns, 1), ("num_prefix_tokens", num_prefix_tokens, 0)):
        if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool) or n < least:
            raise ValueError(f"{name}={n!r}: expected an integer of at least {least}")
    grid = torch.arange(rows * columns, device=device).view(rows, columns)
    row_is_odd = torch.arange(rows, device=device)[:, None] % 2 == 1
    column_is_odd = torch.arange(columns, device=device)[None, :] % 2 == 1
    by_rows = torch.where(row_is_odd, grid.flip(1), grid).flatten()
    by_columns = torch.where(column_is_odd, grid.flip(0), grid).T.flatten()
    prefix = torch.arange(num_prefix_tokens, device=device).expand(2, -1)
    return torch.cat([prefix, torch.stack([by_rows, by_columns]) + num_prefix_tokens], dim=1)
