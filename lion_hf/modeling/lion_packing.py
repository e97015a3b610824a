"""Rows of tokens with padding and several documents: which token belongs where."""

import torch
from torch.nn import functional as F

from .lion_checks import check_integers, check_mask, check_tensors, has_values


def nearest_token(mask: torch.Tensor) -> torch.Tensor:
    """For every place of a row the last token at or before it, or the row's first token if there is none, (B, L).

    Args:
        mask: (B, L), True for tokens and False for padding.
    """
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).cummax(1).values
    return torch.where(last < 0, mask.int().argmax(1, keepdim=True), last)


INDEX_TYPES = (torch.int32, torch.int64)  # that embeddings take
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
        None if there is too little padding, a token that is not finite, or no telling (`has_values`); else the tokens
        (1, T, hidden), their documents (1, T), and their places in the flattened batch (T,).
    """
    if not (has_values(hidden_states) and has_values(attention_mask)):
        return None
    batch, length = attention_mask.shape
    places = (attention_mask != 0).flatten().nonzero().squeeze(1)
    if not 0 < len(places) <= (1 - LEAST_PADDING) * batch * length:
        return None
    if not hidden_states.isfinite().all():  # in one row with the others such a token would reach them
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


def document_indices(
    shape: tuple[int, int], attention_mask, position_ids, cu_seq_lens_q=None, cu_seq_lens_k=None
) -> torch.Tensor | None:
    """Numbers the documents of packed rows, (B or 1, L), or None if nothing tells of packing.

    A document begins at each of `cu_seq_lens_q` or `cu_seq_lens_k` (n + 1 offsets into one flat row), else wherever the
    position of a token is not above that of the token before it; padding in between does not count.
    """
    batch, length = shape
    cu_seq_lens = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q with a batch of {batch} rows: expected one flat row of all documents")
        if has_values(cu_seq_lens):
            _check_offsets(cu_seq_lens, length)
            if cu_seq_lens_k is not None and not torch.equal(cu_seq_lens, cu_seq_lens_k):
                raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: expected the same, a document reads itself alone")
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


def check_rows(
    hidden_size: int, input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, seq_idx, *cu_seq_lens
) -> tuple[int, int]:
    """The shape (B, L) of a batch of texts.

    Raises:
        ValueError: if both or none of `input_ids` and `inputs_embeds` are given, the batch is empty in length, or a tensor has
            another shape, type or device.
    """
    rows = {"token_type_ids": token_type_ids, "position_ids": position_ids, "seq_idx": seq_idx}
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("a text model takes either input_ids or inputs_embeds (and no pixel_values)")
    check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **rows)
    check_tensors(**dict(zip(("cu_seq_lens_q", "cu_seq_lens_k"), cu_seq_lens)))
    if input_ids is not None:
        if input_ids.dim() != 2 or input_ids.dtype not in INDEX_TYPES:
            raise ValueError(f"input_ids {tuple(input_ids.shape)} of {input_ids.dtype}: expected int64, (batch, length)")
    elif inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != hidden_size or not inputs_embeds.is_floating_point():
        got = f"{tuple(inputs_embeds.shape)} of {inputs_embeds.dtype}"
        raise ValueError(f"inputs_embeds {got}: expected real numbers, (batch, length, hidden_size={hidden_size})")
    shape = tuple((input_ids if inputs_embeds is None else inputs_embeds).shape[:2])
    if shape[1] == 0:
        raise ValueError(f"a batch of shape {shape}: expected at least one token a row")
    if attention_mask is not None:
        check_mask(attention_mask, shape)
    for name, x in rows.items():
        if x is not None and tuple(x.shape) not in (shape, (1, shape[1])):
            raise ValueError(f"{name} {tuple(x.shape)}: expected (batch or 1, length) = {shape}")
        if x is not None and name != "seq_idx" and x.dtype not in INDEX_TYPES:
            raise ValueError(f"{name} is {x.dtype}: expected int64")
    if seq_idx is not None:
        check_integers("seq_idx", seq_idx)
    return shape


def flat_choices(**inputs: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Inputs of a multiple-choice model, (B, choices, L) and for embeddings their size, as rows (B * choices, L).

    Raises:
        ValueError: for inputs of other dimensions, or without choices.
    """
    check_tensors(**inputs)
    for name, x in inputs.items():
        if x is not None and (x.dim() != (4 if name == "inputs_embeds" else 3) or x.shape[1] == 0):
            raise ValueError(f"{name} {tuple(x.shape)}: expected (batch, choices, length) and for embeddings their size")
    return [None if x is None else x.flatten(0, 1) for x in inputs.values()]


def refuse_packing(model: torch.nn.Module, attention_mask, position_ids, kwargs: dict) -> None:
    """Raises ValueError if the inputs of a model that pools one document a row tell of several."""
    packing = [name for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k") if kwargs.get(name) is not None]
    check_tensors(position_ids=position_ids, attention_mask=attention_mask)
    if position_ids is not None:
        check_integers("position_ids", position_ids)
    if not packing and position_ids is not None and has_values(position_ids):
        shape = position_ids.shape if attention_mask is None else attention_mask.shape
        fits = len(shape) == 2 and position_ids.shape in (shape, (1, shape[1]))  # else the encoder says what is wrong
        if fits and document_indices(shape, attention_mask, position_ids).any():
            packing = ["position_ids that restart"]
    if packing:
        raise ValueError(f"{packing[0]} with {type(model).__name__}: it pools one document a row; pad the documents instead")


def _check_offsets(cu_seq_lens: torch.Tensor, length: int) -> None:
    check_integers("cu_seq_lens_q", cu_seq_lens)
    offsets = cu_seq_lens.tolist() if cu_seq_lens.dim() == 1 else []
    if not offsets or offsets[0] != 0 or offsets[-1] > length or sorted(offsets) != offsets:
        shown = offsets[:8] if offsets else tuple(cu_seq_lens.shape)
        raise ValueError(
            f"cu_seq_lens_q {shown}: expected offsets (0, ..., at most {length}) of the documents in the row, rising"
        )
