"""How fast a model trains: items and operations per step, and the rate of the device."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.modeling_lion import LionPreTrainedModel


def items_and_flops(
    model: Any, inputs: dict[str, Any]
) -> tuple[int | torch.Tensor, float | torch.Tensor]:
    """Tokens (or images) of a batch without padding, and the FLOPs of a training step on them.

    These are two operations per weight and token in the forward pass and four in the backward pass,
    for every matrix that is multiplied. LION's mixing of tokens adds, per token and head, the
    lesser of 4 L D (scores) and 8 D^2 (two states) in the forward pass. What a form, recomputation
    or padding needs beyond that is not counted, as usual for model FLOPs utilisation (arXiv
    2204.02311, appendix B).

    Args:
        model: a model of transformers; for others both numbers are 0, and for a configuration that
            does not tell the operations, such as one with stages of several widths, the second is.
        inputs: what it is called with.
    """
    rows = inputs.get(model.main_input_name) if isinstance(model, PreTrainedModel) else None
    if rows is None or rows.dim() not in (2, 4):
        return 0, 0.0
    shapes, config = inputs.get("spatial_shapes"), model.config
    sizes = ["num_attention_heads", "hidden_size", "num_hidden_layers"]
    sizes += ["patch_size"] * (rows.dim() == 4)
    counted = all(type(getattr(config, name, None)) is int for name in sizes)
    if shapes is not None:  # images in one row; their mean length stands for all
        items, tokens = len(shapes), len(shapes) + len(rows)
        length = tokens / items
    elif rows.dim() == 4:  # images
        items = rows.shape[0]
        length = 1 + rows.shape[-2:].numel() // config.patch_size**2 if counted else 0
        tokens = items * length
    else:
        mask, length = inputs.get("attention_mask"), rows.shape[1]
        items = tokens = rows.numel() if mask is None else mask.sum()
    if not counted:
        return items, 0.0
    weights = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    )
    # None in classifiers, also of a checkpoint that predicted sparsely
    decoder = model.get_output_embeddings()
    if decoder is not None and getattr(config, "sparse_prediction", False) and "labels" in inputs:
        decoder = decoder.weight.numel()  # only for the labelled tokens
        weights = weights - decoder + decoder * (inputs["labels"] != -100).sum() / tokens
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    mixing = (
        min(4 * length * head_dim, 8 * head_dim**2)
        if isinstance(model, LionPreTrainedModel)
        else 4 * length * head_dim
    )
    return items, 3.0 * tokens * (2 * weights + config.num_hidden_layers * heads * mixing)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until a device has done its work; a CPU's is always done."""
    return getattr(getattr(torch, device.type, None), "synchronize", lambda: None)


def matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.3
) -> float:
    """Floating-point operations per second of square matrix products: the best of several."""
    size = size or (2048 if device.type == "cpu" else 8192)  # small ones do not fill a GPU
    synchronize = synchronizer(device)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    matrix @ matrix
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        matrix @ matrix
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
