"""What the hidden states of a long document depend on, so that a cache knows what it belongs to."""

import hashlib
import inspect
import json
import math
from typing import Any

import torch

from .configuration_lion import LionConfig
from .lion_numerics import autocasts

# What PEFT's layers compute with, beside their weights.
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


def fingerprints(model: torch.nn.Module, config: Any, ids: torch.Tensor, piece: int) -> dict:
    """What decides on the hidden states: model, document and size of the pieces.

    Args:
        model: whose weights are hashed, and which of its adapters are switched on.
        config: its `LionConfig`.
        ids: (L,).
        piece: tokens per piece.
    """
    weights = hashlib.sha256()
    classes = [each for each in type(config).__mro__ if issubclass(each, LionConfig)]
    names = {name for each in classes for name in inspect.get_annotations(each)}
    settings = {name: getattr(config, name, None) for name in names}
    weights.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, part in model.named_modules():
        adapters = {key: str(getattr(part, key)) for key in ADAPTER_STATE if hasattr(part, key)}
        if adapters:
            weights.update(f"{name} {adapters}".encode())
    for name, x in sorted(model.state_dict().items()):
        weights.update(name.encode())
        _add(weights, x)
    document = hashlib.sha256(_bytes_of(ids)).hexdigest()
    return {"model": weights.hexdigest(), "document": document, "piece": str(piece)}


def precision(hidden_states: torch.Tensor) -> str:
    """The type of the hidden states, and that of autocast if it is on."""
    name = str(hidden_states.dtype).removeprefix("torch.")
    if autocasts(hidden_states):
        half = torch.get_autocast_dtype(hidden_states.device.type)
        name += f" with autocast to {str(half).removeprefix('torch.')}"
    return name


def alike(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Whether hidden states are equal but for what another number of threads may change."""
    if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    lowest = expected.dtype
    if autocasts(expected):
        lowest = torch.get_autocast_dtype(expected.device.type)
    atol = math.sqrt(torch.finfo(lowest).eps) * float(expected.abs().nan_to_num().max())
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=atol, equal_nan=True)


def _add(weights: Any, x: Any) -> None:
    """Adds what a state dict holds: tensors, those made of others (quantised ones), and objects."""
    if isinstance(x, tuple | list):
        for item in x:
            _add(weights, item)
    elif not isinstance(x, torch.Tensor):
        weights.update(repr(x).encode())
    elif x.is_quantized:
        weights.update(f"{x.dtype} {tuple(x.shape)} {x.qscheme()}".encode())
        per_tensor = x.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
        _add(weights, x.q_scale() if per_tensor else x.q_per_channel_scales())
        _add(weights, x.int_repr())
    elif hasattr(x, "__tensor_flatten__"):
        names, context = x.__tensor_flatten__()
        weights.update(f"{type(x).__name__} {context}".encode())
        for name in names:
            _add(weights, getattr(x, name))
    else:
        weights.update(f"{x.dtype} {tuple(x.shape)}".encode())
        weights.update(_bytes_of(x))


def _bytes_of(x: torch.Tensor) -> memoryview:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
