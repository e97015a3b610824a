"""Rows of tokens with padding and several documents: which token belongs where."""

import torch
from torch.nn import functional as F


def nearest_token(mask: torch.Tensor) -> torch.Tensor:
    """For every place of a row the last token at or before it, or the row's first token if there is none, (B, L).

    Args:
        mask: (B, L), True for tokens and False for padding.
    """
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).cummax(1).values
    return torch.where(last < 0, mask.int().argmax(1, keepdim=True), last)


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """(B, L, hidden) to (B, hidden): the first token that is not padding ("cls"), or the mean over all such ("mean")."""
    if attention_mask is None:
        return hidden_states[:, 0] if pooling == "cls" else hidden_states.mean(1)
    mask = attention_mask != 0
    if pooling == "cls":
        first = mask.int().argmax(1)
        return hidden_states[torch.arange(first.shape[0], device=first.device), first]
    total = hidden_states.masked_fill(~mask[..., None], 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


def document_indices(shape: tuple[int, int], attention_mask, position_ids, cu_seq_lens) -> torch.Tensor | None:
    """Numbers the documents of packed rows, (B or 1, L), or None if nothing tells of packing.

    A document begins at each of `cu_seq_lens` (n + 1 offsets into one flat row), else wherever the position of a token is
    not above that of the token before it; padding in between does not count.
    """
    batch, length = shape
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q with a batch of {batch} rows: expected one flat row of all documents")
        if not torch.compiler.is_compiling():
            _check_offsets(cu_seq_lens, length)
        return torch.searchsorted(cu_seq_lens, torch.arange(length, device=cu_seq_lens.device), right=True)[None]
    if position_ids is None:
        return None
    if attention_mask is not None:
        nearest = nearest_token(attention_mask != 0)
        position_ids = position_ids.expand(batch, -1).gather(1, nearest)
        restarts = (position_ids[:, 1:] <= position_ids[:, :-1]) & (nearest[:, 1:] != nearest[:, :-1])
    else:
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    return F.pad(restarts, (1, 0)).cumsum(-1)


def _check_offsets(cu_seq_lens: torch.Tensor, length: int) -> None:
    offsets = cu_seq_lens.tolist() if cu_seq_lens.dim() == 1 else []
    if not offsets or offsets[0] != 0 or offsets[-1] > length or sorted(offsets) != offsets:
        shown = offsets[:8] if offsets else tuple(cu_seq_lens.shape)
        raise ValueError(
            f"cu_seq_lens_q {shown}: expected offsets (0, ..., at most {length}) of the documents in the row, rising"
        )
