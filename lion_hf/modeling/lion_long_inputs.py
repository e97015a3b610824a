"""What `encode_long` takes, and what it refuses."""

from array import array
from collections.abc import Iterable
from typing import Any

import torch

from .configuration_lion import CLASSIFIER_POOLINGS
from .lion_checks import check_integers

POOLINGS = (*CLASSIFIER_POOLINGS, None)


def check_call(model: Any, piece: int, pooling: str | None) -> None:
    """Raises ValueError for a model that cannot do it, or an illegal piece or pooling."""
    if model.config.modality != "text":
        raise ValueError(
            f"encode_long of a model with modality={model.config.modality!r}: expected 'text'"
        )
    if model.training:
        raise ValueError(
            "encode_long of a model in training: it computes no gradients; expected model.eval()"
        )
    devices = {str(x.device) for x in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"encode_long of a model with weights on {sorted(devices)}: expected one device for"
            " all, without offloading"
        )
    if not isinstance(piece, int) or isinstance(piece, bool) or piece < 1:
        raise ValueError(f"piece={piece!r}: expected an integer of at least 1")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}: expected one of {POOLINGS}")


def read_ids(model: Any, input_ids: torch.Tensor | Iterable) -> torch.Tensor:
    """The ids of the document, (L,), on the CPU.

    Args:
        model: says how many words and positions there are.
        input_ids: a tensor (L,) or (1, L), or an iterable of ids, or of tensors or lists of ids.

    Raises:
        ValueError: for anything else, no ids, ids out of range, or more than the model has learned
            positions.
    """
    words = getattr(model.get_input_embeddings(), "num_embeddings", model.config.vocab_size)
    if isinstance(input_ids, torch.Tensor):
        ids = _flat(input_ids)
        _check_range(ids, 0, words)
    elif isinstance(input_ids, str | bytes | dict) or not isinstance(input_ids, Iterable):
        raise ValueError(
            f"input_ids is {type(input_ids).__name__}: expected a tensor (1, length) or an iterable"
            " of token ids"
        )
    else:
        ids = _collect(input_ids, words)
    if not len(ids):
        raise ValueError("input_ids is empty: expected at least one token")
    positions = model.embeddings.position_embeddings
    if positions is not None and len(ids) > positions.num_embeddings:
        raise ValueError(
            f"input_ids has {len(ids)} tokens: expected at most {positions.num_embeddings}, because"
            f" the model has learned max_position_embeddings={positions.num_embeddings} positions"
        )
    return ids


def _flat(ids: torch.Tensor) -> torch.Tensor:
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != 1):
        raise ValueError(f"input_ids {tuple(ids.shape)}: expected one document, (1, length)")
    check_integers("input_ids", ids)
    return ids.reshape(-1).cpu().long()


def _check_range(ids: torch.Tensor, start: int, words: int) -> None:
    """Raises ValueError for an id out of range; `start` tokens come before these."""
    wrong = ((ids < 0) | (ids >= words)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"input_ids holds {int(ids[place])} at position {start + place}: expected 0 to"
            f" {words - 1}, because vocab_size={words}"
        )


def _collect(stream: Iterable, words: int) -> torch.Tensor:
    """The ids of an iterable of ids, or of tensors or lists of ids."""
    found = array("q")
    for item in stream:
        start = len(found)
        if hasattr(item, "__index__") and not getattr(item, "shape", ()):
            number = item.__index__()
            if not 0 <= number < words:
                _check_range(torch.tensor([number]), start, words)
            found.append(number)
            continue
        try:
            ids = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.tensor(0)
        if ids.dim() == 0:
            raise ValueError(
                f"input_ids gives {item!r:.40} at position {start}: expected token ids, or tensors"
                " or lists of them"
            )
        if ids.numel():
            ids = _flat(ids)
            _check_range(ids, start, words)
            found.frombytes(ids.numpy().data.cast("B"))
    return torch.frombuffer(found, dtype=torch.int64) if found else torch.empty(0).long()


def read_spans(spans: Any, length: int) -> list[tuple[int, int]] | None:
    """The spans as ranges of tokens.

    Args:
        spans: pairs (start, end) with the end excluded, a number of tokens per window, or None.
        length: L.

    Raises:
        ValueError: for anything else, no spans, an empty span, or one beyond the document.
    """
    if spans is None:
        return None
    if isinstance(spans, int) and not isinstance(spans, bool):
        if spans < 1:
            raise ValueError(f"spans={spans}: expected windows of at least 1 token")
        return [(start, min(start + spans, length)) for start in range(0, length, spans)]
    try:
        ranges = [(int(start), int(end)) for start, end in spans]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"spans={spans!r:.60}: expected pairs (start, end) of tokens, or a number of tokens per"
            " window"
        ) from error
    if not ranges:
        raise ValueError("spans is empty: expected at least one pair (start, end)")
    for start, end in ranges:
        if not 0 <= start < end <= length:
            raise ValueError(
                f"spans holds ({start}, {end}): expected 0 <= start < end <= {length}, the length"
                " of the document"
            )
    return ranges
