"""Rows of tokens with padding and several documents: which token belongs where."""

import torch
from torch.nn import functional as F


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """(B, L, hidden) to (B, hidden): the first token that is not padding ("cls"), or the mean over all such ("mean")."""
    if attention_mask is None:
        return hidden_states[:, 0] if pooling == "cls" else hidden_states.mean(1)
    mask = attention_mask != 0
    if pooling == "cls":
        first = mask.int().argmax(1)
        return hidden_states[torch.arange(len(first), device=first.device), first]
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
        return torch.searchsorted(cu_seq_lens, torch.arange(length, device=cu_seq_lens.device), right=True)[None]
    if position_ids is None:
        return None
    if attention_mask is not None:
        steps = torch.arange(length, device=position_ids.device)
        last_token = torch.where(attention_mask != 0, steps, 0).cummax(-1).values
        position_ids = position_ids.expand(batch, -1).gather(-1, last_token)
        restarts = (position_ids[:, 1:] <= position_ids[:, :-1]) & (last_token[:, 1:] != last_token[:, :-1])
    else:
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    return F.pad(restarts, (1, 0)).cumsum(-1)
