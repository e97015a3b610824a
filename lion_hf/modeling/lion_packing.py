"""Rows of tokens with padding and several documents: which token belongs where."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .lion_checks import INDEX_TYPES, check_integers, check_mask, check_tensors
from .lion_numerics import has_values

# Removing padding pays when at least this share of the places is padding (2 CPU cores: see
# benchmarks/results/model-cpu.md).
LEAST_PADDING = 0.1


def nearest_token(mask: torch.Tensor) -> torch.Tensor:
    """For every place of a row the last token at or before it, else the row's first token, (B, L).

    Args:
        mask: (B, L), True for tokens and False for padding.
    """
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).cummax(1).values
    return torch.where(last < 0, mask.int().argmax(1, keepdim=True), last)


def unpad(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, seq_idx: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """All tokens of a padded batch in one row, each row of the batch a document of its own.

    Args:
        hidden_states: (B, L, hidden).
        attention_mask: (B, L), nonzero for tokens.
        seq_idx: (B or 1, L), documents within the rows, or None.

    Returns:
        The tokens (1, T, hidden), their documents (1, T), and their places in the flattened batch
        (T,). None if there is too little padding, if a token is not finite, which would reach the
        others in one row, or if values cannot be looked at (see `has_values`).
    """
    if not (has_values(hidden_states) and has_values(attention_mask)):
        return None
    batch, length = attention_mask.shape
    places = (attention_mask != 0).flatten().nonzero().squeeze(1)
    if not 0 < len(places) <= (1 - LEAST_PADDING) * batch * length:
        return None
    if not hidden_states.isfinite().all():
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
    places = places.to(tokens.device)  # the last layer may be on another device than the first
    return padded.index_copy(0, places, tokens[0]).unflatten(0, shape)


def first_tokens(seq_idx: torch.Tensor) -> torch.Tensor:
    """Whether `seq_idx` (B or 1, L) begins or changes at a place, (B or 1, L)."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)


def pool(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pooling: str,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """One vector per row, (B, L, hidden) to (B, hidden), or per document of one row.

    Args:
        hidden_states: (B, L, hidden).
        attention_mask: (B, L), nonzero for tokens, or None.
        pooling: "cls" for the first token that is not padding, "mean" for the mean of all such.
        lengths: of the documents in a single row without padding; None for one per row.
    """
    if lengths is not None:
        documents = hidden_states[0].split(list(lengths))
        return torch.cat([pool(document[None], None, pooling) for document in documents])
    if attention_mask is None:
        return hidden_states[:, 0] if pooling == "cls" else hidden_states.mean(1)
    mask = attention_mask != 0
    if pooling == "cls":
        first = mask.int().argmax(1)
        return hidden_states[torch.arange(first.shape[0], device=first.device), first]
    # Neither the sum of a long row nor the number of its tokens need be in the range of float16.
    exact = torch.promote_types(hidden_states.dtype, torch.float32)
    total = hidden_states.masked_fill(~mask[..., None], 0).sum(1, dtype=exact)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


def document_indices(
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Numbers the documents of packed rows.

    A document begins at each of `cu_seq_lens_q` or `cu_seq_lens_k`, else wherever the position of a
    token is not above that of the token before it; padding in between does not count.

    Args:
        shape: (B, L).
        attention_mask: (B, L), nonzero for tokens.
        position_ids: (B or 1, L).
        cu_seq_lens_q: offsets of the documents in the rows, (B, documents + 1), or of one flat row,
            (documents + 1,).
        cu_seq_lens_k: the same.

    Returns:
        (B or 1, L), or None if nothing tells of packing.

    Raises:
        ValueError: for offsets that do not fit the rows.
    """
    cu_seq_lens = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    if cu_seq_lens is not None:
        return _documents_of_offsets(shape, cu_seq_lens, cu_seq_lens_k)
    if position_ids is None:
        return None
    if attention_mask is None:
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    else:
        nearest = nearest_token(attention_mask != 0)
        position_ids = position_ids.expand(shape[0], -1).gather(1, nearest)
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
        restarts = restarts & (nearest[:, 1:] != nearest[:, :-1])
    return F.pad(restarts, (1, 0)).cumsum(-1)


def _documents_of_offsets(
    shape: tuple[int, int], cu_seq_lens: torch.Tensor, cu_seq_lens_k: torch.Tensor | None
) -> torch.Tensor:
    batch, length = shape
    if cu_seq_lens.dim() != 2 and batch != 1:
        raise ValueError(
            f"cu_seq_lens_q with a batch of {batch} rows: expected one flat row of all documents,"
            " or offsets for every row"
        )
    if has_values(cu_seq_lens):
        _check_offsets(cu_seq_lens, shape)
        if cu_seq_lens_k is not None and not torch.equal(cu_seq_lens, cu_seq_lens_k):
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k differ: expected the same, because a document"
                " reads only itself"
            )
    offsets = cu_seq_lens if cu_seq_lens.dim() == 2 else cu_seq_lens[None]
    places = torch.arange(length, device=cu_seq_lens.device).expand(batch, -1).contiguous()
    return torch.searchsorted(offsets.contiguous(), places, right=True)


def _check_offsets(cu_seq_lens: torch.Tensor, shape: tuple[int, int]) -> None:
    check_integers("cu_seq_lens_q", cu_seq_lens)
    batch, length = shape
    rows = cu_seq_lens[None] if cu_seq_lens.dim() == 1 else cu_seq_lens
    fits = rows.dim() == 2 and len(rows) == batch and rows.shape[1] > 0
    for offsets in rows.tolist() if fits else [[]]:
        if not offsets or offsets[0] != 0 or offsets[-1] > length or sorted(offsets) != offsets:
            shown = offsets[:8] if offsets else tuple(cu_seq_lens.shape)
            raise ValueError(
                f"cu_seq_lens_q {shown}: expected offsets (0, ..., at most {length}) of the"
                " documents in the row, rising"
            )


def check_rows(
    hidden_size: int,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    **others: torch.Tensor | None,
) -> tuple[int, int]:
    """Checks a batch of texts.

    Args:
        hidden_size: of the model.
        input_ids: (B, L).
        inputs_embeds: (B, L, hidden).
        **others: attention_mask, token_type_ids, position_ids, seq_idx and cu_seq_lens_*.

    Returns:
        (B, L).

    Raises:
        ValueError: if both or none of `input_ids` and `inputs_embeds` are given, the rows are
            empty, or a tensor has another shape, type or device.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "a text model takes either input_ids or inputs_embeds (and no pixel_values)"
        )
    check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds, **others)
    if input_ids is not None:
        if input_ids.dim() != 2 or input_ids.dtype not in INDEX_TYPES:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} of {input_ids.dtype}: expected int64,"
                " (batch, length)"
            )
        shape = (input_ids.shape[0], input_ids.shape[1])
    elif inputs_embeds is not None:
        shape = _shape_of_embeddings(hidden_size, inputs_embeds)
    if shape[1] == 0:
        raise ValueError(f"a batch of shape {shape}: expected at least one token per row")
    mask = others.get("attention_mask")
    if mask is not None:
        check_mask(mask, shape)
    for name in ("token_type_ids", "position_ids", "seq_idx"):
        x = others.get(name)
        if x is None:
            continue
        if tuple(x.shape) not in (shape, (1, shape[1])):
            raise ValueError(f"{name} {tuple(x.shape)}: expected (batch or 1, length) = {shape}")
        if name == "seq_idx":
            check_integers(name, x)
        elif x.dtype not in INDEX_TYPES:
            raise ValueError(f"{name} is {x.dtype}: expected int64")
    return shape


def _shape_of_embeddings(hidden_size: int, inputs_embeds: torch.Tensor) -> tuple[int, int]:
    shape = inputs_embeds.shape
    if len(shape) != 3 or shape[2] != hidden_size or not inputs_embeds.is_floating_point():
        got = f"{tuple(shape)} of {inputs_embeds.dtype}"
        raise ValueError(
            f"inputs_embeds {got}: expected real numbers,"
            f" (batch, length, hidden_size={hidden_size})"
        )
    return shape[0], shape[1]


def flat_choices(**inputs: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Inputs of a multiple-choice model, (B, choices, L, ...), as rows (B * choices, L, ...).

    Raises:
        ValueError: for inputs of other dimensions, or without choices.
    """
    check_tensors(**inputs)
    for name, x in inputs.items():
        if x is not None and (x.dim() != 3 + (name == "inputs_embeds") or x.shape[1] == 0):
            raise ValueError(
                f"{name} {tuple(x.shape)}: expected (batch, choices, length) and for embeddings"
                " their size"
            )
    return {name: None if x is None else x.flatten(0, 1) for name, x in inputs.items()}


def refuse_packing(
    model: torch.nn.Module,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
) -> None:
    """Checks that each row of a model that pools one document per row holds one.

    Where values cannot be looked at, `seq_idx` and `cu_seq_lens_*` are refused and `position_ids`
    are taken as those of one document. What does not fit in shape is left to the encoder.

    Raises:
        ValueError: if the inputs tell of several documents in a row.
    """
    rows = {"attention_mask": attention_mask, "position_ids": position_ids, "seq_idx": seq_idx}
    offsets = {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
    check_tensors(**rows, **offsets)
    for name, x in {"position_ids": position_ids, "seq_idx": seq_idx, **offsets}.items():
        if x is not None:
            check_integers(name, x)
    sign = _sign_of_packing(rows, offsets)
    if sign is not None:
        raise ValueError(
            f"{sign} with {type(model).__name__}: it pools one document per row; pad the documents"
            " instead"
        )


def _sign_of_packing(
    rows: dict[str, torch.Tensor | None], offsets: dict[str, torch.Tensor | None]
) -> str | None:
    """Which input tells of several documents in a row, if one does."""
    for name, x in offsets.items():
        if x is not None and (not has_values(x) or _several_documents(x)):
            return name
    mask, position_ids, seq_idx = rows["attention_mask"], rows["position_ids"], rows["seq_idx"]
    found = position_ids if seq_idx is None else seq_idx
    if found is None:
        return None
    if not has_values(found):
        return None if seq_idx is None else "seq_idx"
    shape = tuple(found.shape if mask is None else mask.shape)
    if len(shape) != 2 or tuple(found.shape) not in (shape, (1, shape[1])):
        return None
    if seq_idx is None:
        documents = document_indices(shape, mask, position_ids)
        restart = documents is not None and documents.any()
        return "position_ids that restart" if restart else None
    if mask is not None:
        seq_idx = seq_idx.expand(shape[0], -1).gather(1, nearest_token(mask != 0))
    return "seq_idx" if (seq_idx[:, 1:] != seq_idx[:, :-1]).any() else None


def _several_documents(cu_seq_lens: torch.Tensor) -> bool:
    """Whether offsets tell of more than one document in a row that is not empty."""
    if cu_seq_lens.dim() == 0:
        return False
    sizes = cu_seq_lens[..., 1:] - cu_seq_lens[..., :-1]
    return bool(((sizes > 0).sum(-1) > 1).any())
