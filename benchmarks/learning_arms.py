"""The models that benchmarks/learning.py compares, all of one size.

An arm is a row of `ARMS` for text, of `IMAGE_ARMS` for images. The softmax twin and the control are
the modern block with another mixing of the tokens in place of LION's, so that they differ from it
in the mixing alone.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from learning_tasks import VOCABULARY, Task
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from lion_hf import LionConfig, LionForImageClassification, LionForMaskedLM

WIDTH, LAYERS, HEADS = 128, 4, 4
START = WIDTH**-0.5  # deviation of the initial weights
MLP = 4 * WIDTH
GATED_MLP = 344  # of three matrices that have as many weights as the two of `MLP`
MODERN_BERT_MLP = 352  # it has no convolutions and no biases
IMAGE_MLP = 332  # the convolutions of images have three times as many weights
MODERN = {
    "pre_norm": True,
    "conv_kernel_size": 3,
    "conv_placement": "inputs",
    "gated_mlp": True,
    "scale_output_init": True,
    "feature_map": "sqrt_softmax",
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


def softmax_mixing(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Softmax attention, (B, H, L, D); `mask` is (B, L), 0 for padding."""
    allowed = None if mask is None else (mask != 0)[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def rotary_softmax(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Softmax attention with rotary positions, as `softmax_mixing`."""
    return softmax_mixing(rotate(query), rotate(key), value, mask)


def no_mixing(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The values alone: only the convolutions mix tokens. Queries and keys count, times zero."""
    return value + 0 * (query + key)


def mixed_by(
    mixing: Callable,
    attention: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    conv_layout: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Stands in for `LionAttention.forward` of the new block, with another mixing of the tokens."""
    query, key, value = attention.project(hidden_states, conv_layout)
    return attention.merge(mixing(query, key, value, attention_mask)), None


def with_mixing(model: PreTrainedModel, mixing: Callable) -> PreTrainedModel:
    """The model with another mixing of the tokens in every layer."""
    for layer in model.lion.layers:
        layer.attention.forward = functools.partial(mixed_by, mixing, layer.attention)
    return model


def other_mixing(vocab_size: int, length: int, mixing: Callable, **fields: Any) -> PreTrainedModel:
    """The new block with another mixing; it has no gates, and padding is not taken out."""
    plain = {"mask_type": "lit", "use_position_embeddings": False, "attention_form": "attention"}
    return with_mixing(lion(vocab_size, length, **(MODERN | plain | fields)), mixing)


def modern(mask_type: str, **fields: Any) -> Callable[[int, int], PreTrainedModel]:
    """The new LION of a family."""
    return functools.partial(lion, mask_type=mask_type, **(MODERN | fields))


ARMS: dict[str, Callable[[int, int], PreTrainedModel]] = {
    "LION-S of the paper": functools.partial(lion, mask_type="selective"),
    "modern LION-S": modern("selective"),
    "modern LION-D": modern("decay"),
    "modern LION-lit": modern("lit", intermediate_size=336),  # it has positions
    "LION-S, normalized silu": modern("selective", feature_map="normalized_silu"),
    "LION-S, convolved projections": modern("selective", conv_placement="projections"),
    "BERT": bert,
    "ModernBERT": modern_bert,
    "softmax twin": functools.partial(other_mixing, mixing=rotary_softmax),
    "softmax twin, convolved projections": functools.partial(
        other_mixing, mixing=rotary_softmax, conv_placement="projections"
    ),
    "convolution only": functools.partial(other_mixing, mixing=no_mixing),
}

IMAGE = {
    "image_size": 28,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 10,
    **SIZES,
    **NO_DROPOUT,
}


def lion_image(**fields: Any) -> LionForImageClassification:
    """A LION of the benchmark's size for images of 28 x 28 grey pixels, 49 patches."""
    options = {"modality": "image", "intermediate_size": MLP, "drop_path_rate": 0.0, **IMAGE}
    return LionForImageClassification(LionConfig(**{**options, **fields}))


def modern_image(mask_type: str) -> LionForImageClassification:
    """The new block with convolutions of 3 x 3 patches, and both S-curves where there are gates."""
    order = "raster" if mask_type == "lit" else "snake"
    return lion_image(
        mask_type=mask_type, patch_order=order, **(MODERN | {"intermediate_size": IMAGE_MLP})
    )


def image_twin() -> PreTrainedModel:
    """The new block with softmax attention; like LION's image models it learns positions."""
    return with_mixing(modern_image("lit"), softmax_mixing)


def vit() -> ViTForImageClassification:
    """ViT of the same size."""
    return ViTForImageClassification(ViTConfig(intermediate_size=MLP, **IMAGE))


IMAGE_ARMS: dict[str, Callable[[], PreTrainedModel]] = {
    "LION-S of the paper": functools.partial(
        lion_image, mask_type="selective", patch_order="snake"
    ),
    "modern LION-S": functools.partial(modern_image, "selective"),
    "modern LION-D": functools.partial(modern_image, "decay"),
    "modern LION-lit": functools.partial(modern_image, "lit"),
    "ViT": vit,
    "softmax twin": image_twin,
}


def arms_of(task: Task) -> list[str]:
    """The names of the arms that can learn a task."""
    return list(IMAGE_ARMS if task.kind == "images" else ARMS)


class Answer(NamedTuple):
    """Loss and logits, (B, classes)."""

    loss: torch.Tensor
    logits: torch.Tensor


class Classifier(nn.Module):
    """A linear layer on the mean of an encoder's last hidden states, the same for all arms.

    Args:
        encoder: what gives hidden states, (B, L, hidden).
        classes: number of classes.
    """

    def __init__(self, encoder: PreTrainedModel, classes: int):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(WIDTH, classes)
        nn.init.zeros_(self.classifier.weight)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> Answer:
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        weights = attention_mask[..., None].to(outputs.last_hidden_state.dtype)
        pooled = (outputs.last_hidden_state * weights).sum(1) / weights.sum(1)
        logits = self.classifier(pooled)
        return Answer(F.cross_entropy(logits, labels), logits)


def build(arm: str, kind: str, length: int, classes: int, weights: Path | None) -> nn.Module:
    """The model of an arm.

    Args:
        arm: a name in `ARMS`, or in `IMAGE_ARMS`.
        kind: that of the task.
        length: tokens per row, at most.
        classes: of a task with classes.
        weights: a masked language model's to begin with; None to begin anew. Positions that it does
            not have begin anew.
    """
    if kind == "images":
        return IMAGE_ARMS[arm]()
    model = ARMS[arm](VOCABULARY, length)
    if weights is not None:
        _load(model, weights)
    return model if kind != "labels" else Classifier(model.base_model, classes)


@torch.no_grad()
def _load(model: nn.Module, file: Path) -> None:
    found = load_file(file)
    for name, parameter in model.named_parameters():
        if name in found:
            rows = min(len(found[name]), len(parameter))
            parameter[:rows] = found[name][:rows]
