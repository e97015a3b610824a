"""The parts of a layer: gates, attention, MLP, residual block and pooler."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_lion import LionConfig
from .lion_convolution import Layout, LionConvolution
from .lion_numerics import autocasts, full_precision
from .lion_ops import lion_attention
from .lion_packing import first_tokens, pool
from .lion_ranks import SequenceRanks

# Tokens at a time of an MLP on a CPU, without gradients: its wide intermediates stay in memory at
# hand (0.95 times the time).
MLP_TOKENS = 1024


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def drop_path(
    x: torch.Tensor, rate: float, training: bool, seq_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """Stochastic depth (arXiv 1603.09382): drops a residual branch, (B, ...), for whole samples.

    Samples are the rows, or with `seq_idx` (B or 1, L) the documents of x (B, L, hidden).
    """
    if not training or rate == 0.0:
        return x
    if seq_idx is None:
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= rate
    else:
        documents = first_tokens(seq_idx).cumsum(1) - 1
        draws = torch.rand(x.shape[:2], device=x.device)
        keep = draws.gather(1, documents.expand(x.shape[:2]))[..., None] >= rate
    return x * (keep / (1 - rate)).to(x.dtype)


class LionDecay(nn.Module):
    """LION-D's gates before the sigmoid: one number per head and curve, equal for all tokens."""

    def __init__(self, num_gates: int, dtype: torch.dtype):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_gates, dtype=dtype))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.bias[None, None]


class LionGate(nn.Linear):
    """LION-S's gates before the sigmoid: a number per head and curve, linear in the token."""


class LionAttention(nn.Module):
    """Multi-head bidirectional linear attention.

    Projections, convolutions, gates, `lion_attention` and the output projection.
    """

    def __init__(self, config: LionConfig):
        super().__init__()
        self.config = config
        size, num_gates = config.hidden_size, config.num_attention_heads * config.num_patch_orders
        self.q_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, size, bias=config.qkv_bias)
        convolved = config.conv_kernel_size is not None and config.conv_placement == "projections"
        self.q_conv = LionConvolution(config) if convolved else None
        self.k_conv = LionConvolution(config) if convolved else None
        self.v_conv = LionConvolution(config) if convolved else None
        self.gate: Any = None  # LionDecay or LionGate, which PEFT may wrap
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
        if config.mask_type == "decay":
            self.gate = LionDecay(num_gates, dtype=exact)
        elif config.mask_type == "selective":
            self.gate = LionGate(size, num_gates, dtype=exact)
        self.norm = nn.LayerNorm(size, eps=1e-5) if config.attention_norm else None
        self.o_proj = nn.Linear(size, size)
        self.ranks: SequenceRanks | None = None  # set by `sequence_parallel`

    def log_decay(
        self, hidden_states: torch.Tensor, seq_idx: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Logarithms of the gates for the layer's input.

        Args:
            hidden_states: (B, L, hidden).
            seq_idx: (1, L), the images of a packed row; their first tokens are class tokens.

        Returns:
            (B or 1, heads, L or 1), with curves (see `CURVES`) one such for each, or None for lit.
        """
        if self.gate is None:
            return None
        with full_precision(hidden_states):
            if self.config.mask_type == "decay":  # a = sigmoid(w)
                gates = F.logsigmoid(_at_least_float32(self.gate(hidden_states)))
            else:  # a = 1 - sigmoid(W x + b)
                inputs = hidden_states.to(self.gate.weight.dtype)
                gates = F.logsigmoid(-_at_least_float32(self.gate(inputs)))
        # (curves, B, heads, L)
        gates = gates.unflatten(-1, (self.config.num_patch_orders, -1)).permute(2, 0, 3, 1)
        if self.config.mask_type == "selective" and self.config.modality == "image":
            if seq_idx is None:
                gates = F.pad(gates[..., 1:], (1, 0))  # the class token's gate is 1
            else:
                gates = gates.masked_fill(first_tokens(seq_idx), 0)
        return gates.squeeze(0) if self.config.patch_order == "raster" else gates

    def project(
        self, hidden_states: torch.Tensor, conv_layout: Layout = None, parts: str = "qkv"
    ) -> list[torch.Tensor]:
        """Queries, keys and values per head.

        Args:
            hidden_states: the layer's input, (B, L, hidden).
            conv_layout: as in `LionConvolution`.
            parts: which of them, by their first letters.

        Returns:
            (B, heads, L, head_dim) for each letter.
        """
        inputs = hidden_states
        eager = not torch.compiler.is_compiling()
        if eager and inputs.dtype == torch.float32 and autocasts(inputs):
            # once, not for each projection and its gradient
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        projected = [getattr(self, f"{part}_proj")(inputs) for part in parts]
        convolutions = [getattr(self, f"{part}_conv") for part in parts]
        projected = [
            x if conv is None else conv(x, conv_layout) for conv, x in zip(convolutions, projected)
        ]
        return [x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for x in projected]

    def merge(self, output: torch.Tensor) -> torch.Tensor:
        """The heads' outputs (B, heads, L, head_dim) through the output projection."""
        output = output.transpose(1, 2).flatten(2)
        return self.o_proj(output if self.norm is None else self.norm(output))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
        conv_layout: Layout = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.ranks is not None:
            self.ranks.check(attention_mask, seq_idx, output_attentions, self)
            return self.ranks.attend(self, hidden_states), None
        config = self.config
        query, key, value = self.project(hidden_states, conv_layout)
        result = lion_attention(
            query,
            key,
            value,
            self.log_decay(hidden_states, seq_idx),
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            order=order,
            feature_map=config.feature_map,
            normalize=config.normalize_attention,
            dropout_p=config.attention_probs_dropout_prob if self.training else 0.0,
            form=config.attention_form,
            chunk_size=config.chunk_size,
            need_weights=output_attentions,
        )
        output, weights = result if isinstance(result, tuple) else (result, None)
        return self.merge(output), weights


class LionMLP(nn.Module):
    """Two linear layers with an activation between them.

    Gated, the first has two halves, and the activation of one is multiplied by the other.
    """

    def __init__(self, config: LionConfig):
        super().__init__()
        self.gated = config.gated_mlp
        width = config.intermediate_size * (2 if self.gated else 1)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        whole = recorded or hidden_states.device.type != "cpu"
        if whole or hidden_states.shape[:-1].numel() <= MLP_TOKENS:
            return self._transform(hidden_states)
        pieces = hidden_states.flatten(0, 1).split(MLP_TOKENS)
        outputs = [self._transform(piece) for piece in pieces]
        return torch.cat(outputs).view(hidden_states.shape)

    def _transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        if not self.gated:
            return self.fc2(self.act(hidden_states))
        active, factor = hidden_states.chunk(2, dim=-1)
        return self.fc2(self.act(active) * factor)


class LionLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with dropout, stochastic depth and a residual.

    The norms come before them or after them (`pre_norm`).
    """

    def __init__(self, config: LionConfig, drop_path_rate: float):
        super().__init__()
        self.pre_norm, self.drop_path_rate = config.pre_norm, drop_path_rate
        self.attention = LionAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LionMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        convolved = config.conv_kernel_size is not None and config.conv_placement == "inputs"
        self.attention_conv = LionConvolution(config) if convolved else None
        self.mlp_conv = LionConvolution(config) if convolved else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def drop(self, branch: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
        return drop_path(self.dropout(branch), self.drop_path_rate, self.training, seq_idx)

    def convolve(
        self, conv: LionConvolution | None, hidden_states: torch.Tensor, conv_layout: Layout
    ) -> torch.Tensor:
        """What a branch reads, through its convolution if it has one."""
        if conv is None:
            return hidden_states
        if self.attention.ranks is not None:
            return self.attention.ranks.convolve(conv, hidden_states)
        return conv(hidden_states, conv_layout)

    def attention_input(
        self, hidden_states: torch.Tensor, conv_layout: Layout = None
    ) -> torch.Tensor:
        """What the attention reads."""
        inputs = self.attention_norm(hidden_states) if self.pre_norm else hidden_states
        return self.convolve(self.attention_conv, inputs, conv_layout)

    def finish(
        self,
        hidden_states: torch.Tensor,
        mixed: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        conv_layout: Layout = None,
    ) -> torch.Tensor:
        """Everything after the attention, which gave `mixed` for the layer's input."""
        hidden_states = hidden_states + self.drop(mixed, seq_idx)
        if self.pre_norm:
            inputs = self.convolve(self.mlp_conv, self.mlp_norm(hidden_states), conv_layout)
            return hidden_states + self.drop(self.mlp(inputs), seq_idx)
        hidden_states = self.attention_norm(hidden_states)
        inputs = self.convolve(self.mlp_conv, hidden_states, conv_layout)
        return self.mlp_norm(hidden_states + self.drop(self.mlp(inputs), seq_idx))

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        conv_layout = kwargs.get("conv_layout")
        inputs = self.attention_input(hidden_states, conv_layout)
        mixed, _ = self.attention(inputs, **kwargs)
        return self.finish(hidden_states, mixed, kwargs.get("seq_idx"), conv_layout)


class LionPooler(nn.Module):
    """One vector per row or packed image: the class token or the first token, or the mean.

    On text it then passes a dense layer with tanh.
    """

    def __init__(self, config: LionConfig):
        super().__init__()
        self.pooling = config.classifier_pooling
        self.dense = None
        if config.modality == "text":
            self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return self.project(pool(hidden_states, attention_mask, self.pooling, lengths))

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """The pooler's output for a pooled vector, (B, hidden)."""
        return pooled if self.dense is None else torch.tanh(self.dense(pooled))
