"""The models that benchmarks/learning.py compares, all of one size.

An arm is a row of `ARMS`. The softmax twin and the control are the modern block with another mixing
of the tokens in place of LION's, so that they differ from it in the mixing alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
)

from lion_hf import LionConfig, LionForMaskedLM

WIDTH, LAYERS, HEADS = 128, 4, 4
START = WIDTH**-0.5  # deviation of the initial weights
MLP = 4 * WIDTH
GATED_MLP = 344  # of three matrices that have as many weights as the two of `MLP`
MODERN_BERT_MLP = 352  # it has no convolutions and no biases
MODERN = {
    "pre_norm": True,
    "conv_kernel_size": 3,
    "gated_mlp": True,
    "scale_output_init": True,
    "feature_map": "normalized_silu",
    "normalize_attention": True,
    "attention_norm": True,
    "intermediate_size": GATED_MLP,
}


SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "initializer_range": START,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def lion(vocab_size: int, length: int, **fields: Any) -> LionForMaskedLM:
    """A LION of the benchmark's size; `fields` are those of its configuration."""
    options = {
        **SIZES,
        **NO_DROPOUT,
        "intermediate_size": MLP,
        "vocab_size": vocab_size,
        "max_position_embeddings": length,
        "sparse_prediction": True,
    }
    return LionForMaskedLM(LionConfig(**{**options, **fields}))


def bert(vocab_size: int, length: int) -> BertForMaskedLM:
    """BERT with absolute positions, norms after each block, and torch's softmax attention."""
    config = BertConfig(
        vocab_size=vocab_size,
        intermediate_size=MLP,
        max_position_embeddings=length,
        **SIZES,
        **NO_DROPOUT,
    )
    return BertForMaskedLM(config)


def modern_bert(vocab_size: int, length: int) -> ModernBertForMaskedLM:
    """ModernBERT with rotary positions; its local layers see 128 tokens, as its authors chose."""
    config = ModernBertConfig(
        vocab_size=vocab_size,
        intermediate_size=MODERN_BERT_MLP,
        max_position_embeddings=length,
        **SIZES,
        initializer_cutoff_factor=3.0,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        sparse_prediction=True,
    )
    return ModernBertForMaskedLM(config)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of queries or keys, (B, H, L, D)."""
    length, head_dim = x.shape[-2:]
    rates = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax_mixing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax attention with rotary positions, (B, H, L, D)."""
    return F.scaled_dot_product_attention(rotate(query), rotate(key), value)


def no_mixing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The values alone: only the convolutions mix tokens. Queries and keys count, times zero."""
    return value + 0 * (query + key)


def mixed_by(mixing: Callable, attention: nn.Module, hidden_states: torch.Tensor, **kwargs: Any):
    """Stands in for `LionAttention.forward` of the new block, with another mixing of the tokens."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    convolutions = (attention.q_conv, attention.k_conv, attention.v_conv)
    query, key, value = (
        conv(proj(hidden_states)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for proj, conv in zip(projections, convolutions)
    )
    output = mixing(query, key, value).transpose(1, 2).flatten(2)
    return attention.o_proj(attention.norm(output)), None


def other_mixing(vocab_size: int, length: int, mixing: Callable) -> LionForMaskedLM:
    """The new block with another mixing of the tokens; it has no gates."""
    model = lion(vocab_size, length, **MODERN, mask_type="lit", use_position_embeddings=False)
    for layer in model.lion.layers:
        layer.attention.forward = functools.partial(mixed_by, mixing, layer.attention)
    return model


def modern(mask_type: str, **fields: Any) -> Callable[[int, int], PreTrainedModel]:
    """The new LION of a family."""
    return functools.partial(lion, mask_type=mask_type, **(MODERN | fields))


ARMS: dict[str, Callable[[int, int], PreTrainedModel]] = {
    "LION-S of the paper": functools.partial(lion, mask_type="selective"),
    "modern LION-S": modern("selective"),
    "modern LION-D": modern("decay"),
    "modern LION-lit": modern("lit", intermediate_size=336),  # it has positions
    "BERT": bert,
    "ModernBERT": modern_bert,
    "softmax twin": functools.partial(other_mixing, mixing=softmax_mixing),
    "convolution only": functools.partial(other_mixing, mixing=no_mixing),
}
