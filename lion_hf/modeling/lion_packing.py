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


# Removing padding pays when at least this share of the places is padding (2 CPU cores: see benchmarks/results/model-cpu.md).
LEAST_PADDING = 0.1


def unpad(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, seq_idx: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """All tokens of a padded batch in one row, each row of the batch a document of its own.

    Args:
        hidden_states: (B, L, hidden).
        attention_mask: (B, L), nonzero for tokens.
        seq_idx: (B or 1, L), documents within the rows, or None.

    Returns:
        None if there is too little padding; else the tokens (1, T, hidden), their documents (1, T), and their places in the
        flattened batch (T,).
    """
    batch, length = attention_mask.shape
    places = (attention_mask != 0).flatten().nonzero().squeeze(1)
    if not 0 < len(places) <= (1 - LEAST_PADDING) * batch * length:
        return None
    rows = places // length
    new = rows[1:] != rows[:-1]
    if seq_idx is not None:
        documents = seq_idx.expand(batch, -1).flatten()[places]
        new = new | (documents[1:] != documents[:-1])
    return hidden_states.flatten(0, 1)[places][None], F.pad(new, (1, 0)).cumsum(-1)[None], places


def repad(tokens: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Undoes `unpad`, (1, T, hidden) to (B, L, hidden), with zeros at padding."""
    padded = tokens.new_zeros(shape[0] * shape[1], tokens.shape[-1])
    return padded.index_copy(0, places, tokens[0]).unflatten(0, shape)


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """(B, L, hidden) to (B, hidden): the first token that is not padding ("cls"), or the mean over all such ("mean")."""
    if attention_mask is None:
        return hidden_states[:, 0] if pooling == "cls" else hidden_states.mean(1)
    mask = attention_mask != 0
    if pooling == "cls":
        first = mask.int().argmax(1)
        return hidden_states[torch.arange(first.shape[0], device=first.device), first]
    # neither the sum of a long row nor the number of its tokens need be in the range of float16
    total = hidden_states.masked_fill(~mask[..., None], 0).sum(1, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


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


def check_rows(shape: tuple[int, int], attention_mask=None, **tensors) -> None:
    """Raises ValueError if the batch is empty in length, or a mask or numbering of its tokens has another shape."""
    if shape[1] == 0:
        raise ValueError(f"a batch of shape {shape}: expected at least one token a row")
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)}: expected (batch, length) = {shape}")
    for name, x in tensors.items():
        if x is not None and tuple(x.shape) not in (shape, (1, shape[1])):
            raise ValueError(f"{name} {tuple(x.shape)}: expected (batch or 1, length) = {shape}")


def refuse_packing(model: torch.nn.Module, attention_mask, position_ids, kwargs: dict) -> None:
    """Raises ValueError if the inputs of a model that pools one document a row tell of several."""
    packing = [name for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k") if kwargs.get(name) is not None]
    if not packing and position_ids is not None and position_ids.dim() == 2 and not torch.compiler.is_compiling():
        shape = position_ids.shape if attention_mask is None else attention_mask.shape
        if document_indices(shape, attention_mask, position_ids, None).any():
            packing = ["position_ids that restart"]
    if packing:
        raise ValueError(f"{packing[0]} with {type(model).__name__}: it pools one document a row; pad the documents instead")


def _check_offsets(cu_seq_lens: torch.Tensor, length: int) -> None:
    offsets = cu_seq_lens.tolist() if cu_seq_lens.dim() == 1 else []
    if not offsets or offsets[0] != 0 or offsets[-1] > length or sorted(offsets) != offsets:
        shown = offsets[:8] if offsets else tuple(cu_seq_lens.shape)
        raise ValueError(
            f"cu_seq_lens_q {shown}: expected offsets (0, ..., at most {length}) of the documents in the row, rising"
        )
