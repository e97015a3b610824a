"""What `encode_long` takes, and what it refuses."""

import operator
from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules import module as torch_modules
from transformers.utils import output_capturing

from .configuration_lion import CLASSIFIER_POOLINGS
from .lion_checks import check_integers
from .lion_numerics import has_values

POOLINGS = (*CLASSIFIER_POOLINGS, None)


def check_call(model: Any, pooling: str | None) -> None:
    """Raises ValueError for a model that cannot do it, or an illegal pooling."""
    if model.config.modality != "text":
        raise ValueError(
            f"encode_long of a model with modality={model.config.modality!r}: expected 'text'"
        )
    if trains(model):
        raise ValueError(
            "encode_long of a model in training: it computes no gradients; expected model.eval()"
        )
    if in_ranks(model):
        raise ValueError(
            "encode_long within sequence_parallel: it does not share a document between processes;"
            " expected a call outside of it"
        )
    place = watched(model)
    if place is not None:
        raise ValueError(
            f"encode_long of a model with {place}: it computes in pieces, without the layers'"
            " forward; expected no hooks, or a call of forward"
        )
    devices = {str(x.device) for x in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"encode_long of a model with weights on {sorted(devices)}: expected one device for"
            " all, without offloading"
        )
    if pooling is not None and not (isinstance(pooling, str) and pooling in POOLINGS):
        raise ValueError(f"pooling={pooling!r}: expected one of {POOLINGS}")


def trains(model: torch.nn.Module) -> bool:
    """Whether any part of a model is in training, so that it may drop out."""
    return any(part.training for part in model.modules())


def in_ranks(model: Any) -> bool:
    """Whether the model is inside `sequence_parallel`."""
    return any(layer.attention.ranks is not None for layer in model.layers)


def watched(model: torch.nn.Module) -> str | None:
    """What somebody has put around the parts of a model, where it is, or None.

    It would not run at all in pieces, or once per piece. The model's own hooks do not count: they
    run around its forward pass as ever.
    """
    for kind in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        if getattr(torch_modules, kind):
            return "hooks on all modules (register_module_forward_hook)"
    for name, part in model.named_modules():
        if part is model:
            continue
        if "forward" in vars(part):
            return f"another forward set on {name}"
        hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if not all(map(_harmless, hooks)):
            return f"a hook on {name}"
    return None


def _harmless(hook: Any) -> bool:
    """Whether a hook does nothing here.

    Those of transformers act only where layers' outputs are asked for, and those that gradient
    checkpointing of adapters needs ("make_inputs_require_grads") only with gradients.
    """
    if getattr(hook, "__module__", "") == output_capturing.__name__:
        return True
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


def read_piece(piece: Any) -> int:
    """The number of tokens per piece; raises ValueError for anything else."""
    number = _integer(piece)
    if number is None or number < 1:
        raise ValueError(f"piece={piece!r:.60}: expected an integer of at least 1")
    return number


def _integer(x: Any) -> int | None:
    """An integer of Python, NumPy or torch as Python's; None for anything else and booleans."""
    if isinstance(x, bool) or getattr(x, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(x)
    except (TypeError, ValueError, RuntimeError):
        return None


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
    if hasattr(input_ids, "__array__") and not isinstance(input_ids, torch.Tensor):
        input_ids = _tensor(input_ids.__array__(), 0)  # its rows are no pieces of one document
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
    longest = getattr(positions, "num_embeddings", model.config.max_position_embeddings)
    if positions is not None and len(ids) > longest:
        raise ValueError(
            f"input_ids has {len(ids)} tokens: expected at most {longest}, because the model has"
            f" learned max_position_embeddings={longest} positions"
        )
    return ids


def _flat(ids: torch.Tensor) -> torch.Tensor:
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != 1):
        raise ValueError(f"input_ids {tuple(ids.shape)}: expected one document, (1, length)")
    check_integers("input_ids", ids)
    if ids.layout != torch.strided or not has_values(ids):
        kind = f"{ids.layout}, on {ids.device}"
        raise ValueError(f"input_ids is {type(ids).__name__} ({kind}): expected a dense tensor")
    return ids.reshape(-1).cpu().long()


def _tensor(item: Any, position: int) -> torch.Tensor:
    """A tensor of what an iterable gives at a position."""
    try:
        ids = item if isinstance(item, torch.Tensor) else torch.tensor(item)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = torch.tensor(0)
    if ids.dim() == 0:
        raise ValueError(
            f"input_ids gives {item!r:.40} at position {position}: expected token ids, or tensors"
            " or lists of them"
        )
    return ids


def _check_range(ids: torch.Tensor, start: int, words: int) -> None:
    """Raises ValueError for an id out of range; `start` tokens come before these."""
    wrong = ((ids < 0) | (ids >= words)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise _out_of_range(int(ids[place]), start + place, words)


def _out_of_range(number: int, position: int, words: int) -> ValueError:
    return ValueError(
        f"input_ids holds {number!r:.40} at position {position}: expected 0 to {words - 1}, because"
        f" vocab_size={words}"
    )


def _collect(stream: Iterable, words: int) -> torch.Tensor:
    """The ids of an iterable of ids, or of tensors or lists of ids."""
    found = array("q")
    for item in stream:
        start = len(found)
        number = None if getattr(item, "shape", ()) else _integer(item)
        if number is not None:
            if not 0 <= number < words:
                raise _out_of_range(number, start, words)
            found.append(number)
            continue
        ids = _tensor(item, start)
        if ids.numel():
            ids = _flat(ids)
            _check_range(ids, start, words)
            found.frombytes(ids.contiguous().numpy().data.cast("B"))
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
    size = None if getattr(spans, "shape", ()) else _integer(spans)
    if size is not None:
        if size < 1:
            raise ValueError(f"spans={size!r:.60}: expected windows of at least 1 token")
        return [(start, min(start + size, length)) for start in range(0, length, size)]
    try:
        pairs = [(_integer(start), _integer(end)) for start, end in spans]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    ranges = [(start, end) for start, end in pairs if start is not None and end is not None]
    if len(ranges) < len(pairs):
        shown = " ".join(f"{spans!r:.60}".split())
        raise ValueError(
            f"spans={shown}: expected pairs (start, end) of tokens, or a number of tokens per"
            " window"
        )
    if not ranges:
        raise ValueError("spans is empty: expected at least one pair (start, end)")
    for start, end in ranges:
        if not 0 <= start < end <= length:
            raise ValueError(
                f"spans holds ({start}, {end}): expected 0 <= start < end <= {length}, the length"
                " of the document"
            )
    return ranges
