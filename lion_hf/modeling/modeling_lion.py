"""LION encoders for text and images (arXiv 2502.16249): attention, layer, model and heads."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedImageModelingOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_lion import LionConfig
from .lion_code import PushesCode
from .lion_embeddings import LionImageEmbeddings, LionTextEmbeddings
from .lion_loss import LionImageClassifierOutput, check_token_labels, classification_loss, span_loss
from .lion_naive import autocasts, full_precision
from .lion_ops import lion_attention
from .lion_packing import (
    check_rows,
    document_indices,
    flat_choices,
    pool,
    refuse_packing,
    repad,
    unpad,
)

# Half-lives of the gates of an untrained model in tokens: geometrically spaced over the heads of a layer.
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 2.0, 128.0
# Tokens at a time of an MLP on a CPU, without gradients: its wide intermediates stay in memory at hand (0.95 times the time).
MLP_TOKENS = 1024


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def drop_path(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth (arXiv 1603.09382): drops a residual branch, (B, ...), for whole samples."""
    if not training or rate == 0.0:
        return x
    keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)


class LionDecay(nn.Module):
    """LION-D's gates before the sigmoid: one number a head and patch order, the same for every token."""

    def __init__(self, num_gates: int, dtype: torch.dtype):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_gates, dtype=dtype))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.bias[None, None]


class LionGate(nn.Linear):
    """LION-S's gates before the sigmoid: a linear map of the token to one number a head and patch order."""


class LionAttention(nn.Module):
    """Multi-head bidirectional linear attention: projections, gates, `lion_attention`, output projection."""

    def __init__(self, config: LionConfig):
        super().__init__()
        self.config = config
        size, num_gates = config.hidden_size, config.num_attention_heads * config.num_patch_orders
        self.q_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.gate, exact = None, torch.promote_types(torch.get_default_dtype(), torch.float32)
        if config.mask_type == "decay":
            self.gate = LionDecay(num_gates, dtype=exact)
        elif config.mask_type == "selective":
            self.gate = LionGate(size, num_gates, dtype=exact)
        self.norm = nn.LayerNorm(size, eps=1e-5) if config.attention_norm else None
        self.o_proj = nn.Linear(size, size)

    def log_decay(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logarithms of the gates for the layer's input: (B or 1, heads, L or 1), in snake order one such for each order."""
        if self.gate is None:
            return None
        with full_precision(hidden_states):
            if self.config.mask_type == "decay":  # a = sigmoid(w)
                gates = F.logsigmoid(_at_least_float32(self.gate(hidden_states)))
            else:  # a = 1 - sigmoid(W x + b)
                gates = F.logsigmoid(-_at_least_float32(self.gate(hidden_states.to(self.gate.weight.dtype))))
        gates = gates.unflatten(-1, (self.config.num_patch_orders, -1)).permute(2, 0, 3, 1)  # (orders, B, heads, L)
        if self.config.mask_type == "selective" and self.config.modality == "image":
            gates = F.pad(gates[..., 1:], (1, 0))  # the class token's gate is 1
        return gates if self.config.patch_order == "snake" else gates.squeeze(0)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        inputs = hidden_states
        if not torch.compiler.is_compiling() and inputs.dtype == torch.float32 and autocasts(inputs):
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))  # once, not for each projection and its gradient
        query, key, value = (
            proj(inputs).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)  # (B, H, L, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = lion_attention(
            query,
            key,
            value,
            self.log_decay(hidden_states),
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
        output, weights = output if output_attentions else (output, None)
        output = output.transpose(1, 2).flatten(2)
        if self.norm is not None:
            output = self.norm(output)
        return self.o_proj(output), weights


class LionMLP(nn.Module):
    def __init__(self, config: LionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or hidden_states.device.type != "cpu"
        if plain or hidden_states.shape[:-1].numel() <= MLP_TOKENS:
            return self.fc2(self.act(self.fc1(hidden_states)))
        pieces = hidden_states.flatten(0, 1).split(MLP_TOKENS)
        return torch.cat([self.fc2(self.act(self.fc1(piece))) for piece in pieces]).view(hidden_states.shape)


class LionLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with dropout, stochastic depth and residual; norms before them (images) or after (text)."""

    def __init__(self, config: LionConfig, drop_path_rate: float):
        super().__init__()
        self.pre_norm, self.drop_path_rate = config.modality == "image", drop_path_rate
        self.attention = LionAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LionMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def drop(self, branch: torch.Tensor) -> torch.Tensor:
        return drop_path(self.dropout(branch), self.drop_path_rate, self.training)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.pre_norm:
            hidden_states = hidden_states + self.drop(self.attention(self.attention_norm(hidden_states), **kwargs)[0])
            return hidden_states + self.drop(self.mlp(self.mlp_norm(hidden_states)))
        hidden_states = self.attention_norm(hidden_states + self.drop(self.attention(hidden_states, **kwargs)[0]))
        return self.mlp_norm(hidden_states + self.drop(self.mlp(hidden_states)))


class LionPooler(nn.Module):
    """One vector a row: class or first token, or the mean; on text then a dense layer with tanh."""

    def __init__(self, config: LionConfig):
        super().__init__()
        self.pooling = config.classifier_pooling
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if config.modality == "text" else None

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        pooled = pool(hidden_states, attention_mask, self.pooling)
        return pooled if self.dense is None else torch.tanh(self.dense(pooled))


class LionPreTrainedModel(PushesCode, PreTrainedModel):
    config_class = LionConfig
    base_model_prefix = "lion"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LionTextEmbeddings", "LionImageEmbeddings", "LionLayer"]
    _keep_in_fp32_modules_strict = ["gate"]
    _keep_in_fp32_modules = [".*gate"]  # read by the quantisers, some of which match it with parameters' whole names
    _can_record_outputs = {"hidden_states": LionLayer, "attentions": LionAttention}
    input_modalities: tuple[str, ...] = ("text",)

    def __init__(self, config: LionConfig, *args, **kwargs):
        if config.modality not in self.input_modalities:
            raise ValueError(
                f"{type(self).__name__} with modality={config.modality!r}: expected one of {self.input_modalities}"
            )
        config.check()
        super().__init__(config, *args, **kwargs)
        self.main_input_name = "input_ids" if config.modality == "text" else "pixel_values"
        if config.mask_type == "lit":  # no gates
            self._keep_in_fp32_modules, self._keep_in_fp32_modules_strict = [], []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LionImageEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, LionDecay | LionGate):
            heads, orders = self.config.num_attention_heads, self.config.num_patch_orders
            spacing = torch.linspace(0, 1, heads) if heads > 1 else torch.full((1,), 0.5)
            half_lives = SHORTEST_HALF_LIFE * (LONGEST_HALF_LIFE / SHORTEST_HALF_LIFE) ** spacing
            gates_before_sigmoid = torch.logit(0.5 ** (1 / half_lives)).repeat(orders)
            init.copy_(module.bias, gates_before_sigmoid if isinstance(module, LionDecay) else -gates_before_sigmoid)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would pull to a wrong place, besides biases and norms."""
        exempt = ("cls_token", "mask_token", "position_embeddings", "position_embeddings.weight", "gate.bias")
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}


class LionModel(LionPreTrainedModel):
    """The encoder: text or patch embeddings, layers, for images a last norm, and a pooler.

    Args:
        add_pooling_layer: whether to compute `pooler_output`.
        use_mask_token: whether an image model has the token that replaces masked patches.
    """

    input_modalities = ("text", "image")

    def __init__(self, config: LionConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        text, depth = config.modality == "text", config.num_hidden_layers
        self.embeddings = LionTextEmbeddings(config) if text else LionImageEmbeddings(config, use_mask_token)
        rates = [config.drop_path_rate * n / max(depth - 1, 1) for n in range(depth)]
        self.layers = nn.ModuleList([LionLayer(config, rate) for rate in rates])
        self.norm = None if text else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = LionPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings if self.config.modality == "text" else self.embeddings.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.embeddings, "word_embeddings" if self.config.modality == "text" else "patch_embeddings", value)

    def _may_unpad(self, kwargs: dict) -> bool:
        """Whether padding may be taken out: in "auto" form, if nobody looks at the layers' outputs or needs their scores."""
        recorded = any(kwargs.get(name, getattr(self.config, name)) for name in ("output_attentions", "output_hidden_states"))
        scores = self.training and self.config.attention_probs_dropout_prob > 0
        return self.config.attention_form == "auto" and not (recorded or scores)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encodes a batch.

        Args:
            input_ids: ids of tokens, (B, L); text models.
            attention_mask: (B, L), 1 for tokens and 0 for padding, which may stand anywhere.
            token_type_ids: (B, L), zeros if None.
            position_ids: (B or 1, L). Where they restart, a new document begins, which does not see the others.
            inputs_embeds: (B, L, hidden) in place of `input_ids`.
            pixel_values: (B, channels, height, width); image models.
            bool_masked_pos: (B, patches), nonzero where the mask token replaces a patch.
            seq_idx: (B or 1, L), integers that change where a new document begins.
            cu_seq_lens_q: offsets (documents + 1,) of the documents in one flat row, B = 1.
            cu_seq_lens_k: the same; taken because collators pass both.
            **kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Returns:
            `last_hidden_state` (B, L, hidden), not to be read at padding, and `pooler_output` (B, hidden), which knows nothing
            of packing; with `output_attentions` the layers' mixing matrices, (B, heads, L, L), in any configured form.

        Raises:
            ValueError: for inputs of the other modality, both or none of `input_ids` and `inputs_embeds`, an image size that
                the patch does not divide, or a mask of another length.
        """
        order = packed = None
        if self.config.modality == "text":
            if pixel_values is not None:
                raise ValueError("a text model takes either input_ids or inputs_embeds (and no pixel_values)")
            rows = attention_mask, token_type_ids, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k
            shape = check_rows(self.config.hidden_size, input_ids, inputs_embeds, *rows)
            if seq_idx is None:
                seq_idx = document_indices(shape, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
            hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, attention_mask, seq_idx)
            if attention_mask is not None and self._may_unpad(kwargs):
                packed = unpad(hidden_states, attention_mask, seq_idx)
            if packed is not None:
                hidden_states, seq_idx, places = packed
        else:
            if pixel_values is None or input_ids is not None or inputs_embeds is not None:
                raise ValueError("an image model takes pixel_values (and no input_ids or inputs_embeds)")
            order = self.embeddings.reading_orders(pixel_values)
            hidden_states = self.embeddings(pixel_values, bool_masked_pos)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask if packed is None else None,
                seq_idx=seq_idx,
                order=order,
                output_attentions=kwargs.get("output_attentions", self.config.output_attentions) or False,
            )
        if packed is not None:
            hidden_states = repad(hidden_states, places, shape)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class LionForMaskedLM(LionPreTrainedModel):
    """The encoder with BERT's masked-LM head: dense, activation, LayerNorm, and a decoder tied to the word embeddings."""

    _tied_weights_keys = {"decoder.weight": "lion.embeddings.word_embeddings.weight"}

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config, add_pooling_layer=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Takes the inputs of `LionModel` and `labels` (B, L), -100 where there is none; returns `logits` (B, L, V).

        With `config.sparse_prediction` and labels only the labelled tokens get logits, (labelled tokens, V).
        """
        outputs = self.lion(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **_for_encoder(kwargs))
        hidden_states = outputs.last_hidden_state
        labels, kwargs = check_token_labels(labels, hidden_states, self.config.vocab_size, kwargs)
        if labels is not None and self.config.sparse_prediction:
            labelled = labels != -100
            hidden_states, labels = hidden_states[labelled], labels[labelled]
        logits = self.decoder(self.norm(self.act(self.dense(hidden_states))))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class LionForSequenceClassification(LionPreTrainedModel):
    """The encoder with dropout and a linear classifier or regressor on the pooled text."""

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lion = LionModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Takes the inputs of `LionModel`, one document a row, and labels of `classification_loss`; returns `logits` (B, C).

        With `config.problem_type` None it is regression for one label, else classification for integer labels and
        multi-label classification for real ones, as everywhere in transformers; "single_label_classification" with real
        labels (B, C) is cross-entropy with soft targets.
        """
        refuse_packing(self, attention_mask, position_ids, kwargs)
        outputs = self.lion(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **_for_encoder(kwargs))
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            real = torch.is_tensor(labels) and labels.is_floating_point()
            several = "multi_label_classification" if real else "single_label_classification"
            problem_type = self.config.problem_type or ("regression" if self.num_labels == 1 else several)
            loss = classification_loss(logits, labels, problem_type, kwargs.get("num_items_in_batch"))
            self.config.problem_type = problem_type
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class LionForTokenClassification(LionPreTrainedModel):
    """The encoder with dropout and a linear classifier on every token."""

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lion = LionModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Takes the inputs of `LionModel` and `labels` (B, L), -100 where there is none; returns `logits` (B, L, C)."""
        outputs = self.lion(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **_for_encoder(kwargs))
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        labels, kwargs = check_token_labels(labels, logits, self.num_labels, kwargs)
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class LionForQuestionAnswering(LionPreTrainedModel):
    """The encoder with a linear layer that scores every token as start and as end of the answer."""

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Takes the inputs of `LionModel` and the answers' first and last tokens (B,); returns their logits (B, L) each."""
        outputs = self.lion(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **_for_encoder(kwargs))
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            items = kwargs.get("num_items_in_batch")
            loss = span_loss(start_logits, end_logits, start_positions, end_positions, items)
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


class LionForMultipleChoice(LionPreTrainedModel):
    """The encoder with a linear score of the pooled text, compared between the choices of a question."""

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Takes inputs (B, choices, L) and `labels` (B,), the right choice; returns `logits` (B, choices)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        rows = flat_choices(**inputs, position_ids=position_ids, inputs_embeds=inputs_embeds)
        refuse_packing(self, rows[1], rows[3], kwargs)
        outputs = self.lion(*rows, **_for_encoder(kwargs))
        choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, choices)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, "single_label_classification", kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class LionForImageClassification(LionPreTrainedModel):
    """The encoder with a linear classifier on the pooled image."""

    input_modalities, main_input_name = ("image",), "pixel_values"

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lion = LionModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.distiller = nn.Linear(config.hidden_size, config.num_labels) if config.distillation_head else None
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> LionImageClassifierOutput:
        """Takes images (B, channels, height, width) and the labels of `classification_loss`; returns `logits` (B, C).

        With `config.problem_type` None it is regression for one label, else classification; real labels (B, C) are soft
        targets. The loss is the classifier's. Out of training `logits` are the mean with `distillation_logits`, if any.
        """
        outputs = self.lion(pixel_values=pixel_values, **_for_encoder(kwargs))
        logits = self.classifier(outputs.pooler_output)
        distilled = None if self.distiller is None else self.distiller(outputs.last_hidden_state[:, 0])
        logits = logits if self.training or distilled is None else (logits + distilled) / 2
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type or ("regression" if self.num_labels == 1 else "single_label_classification")
            loss = classification_loss(logits, labels, problem_type, kwargs.get("num_items_in_batch"))
        return LionImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions, distilled)


class LionForMaskedImageModeling(LionPreTrainedModel):
    """The encoder with SimMIM's decoder (arXiv 2111.09886): every patch's pixels from its token, L1 loss on masked patches."""

    input_modalities, main_input_name = ("image",), "pixel_values"

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Linear(config.hidden_size, config.patch_size**2 * config.num_channels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, bool_masked_pos: torch.Tensor | None = None, **kwargs
    ) -> MaskedImageModelingOutput:
        """Takes images (B, channels, height, width) and a mask (B, patches); returns `reconstruction`, of the images' shape.

        The loss is the mean absolute error over the pixels of the masked patches; with `num_items_in_batch`, the masked
        patches of the whole accumulated batch, it is the sum divided by their pixels.
        """
        outputs = self.lion(pixel_values=pixel_values, bool_masked_pos=bool_masked_pos, **_for_encoder(kwargs))
        grid, size = self.lion.embeddings.patch_grid(pixel_values), self.config.patch_size
        patches = self.decoder(outputs.last_hidden_state[:, 1:]).mT.unflatten(-1, grid)  # (B, channels * size^2, rows, columns)
        reconstruction = F.pixel_shuffle(patches, size)
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.bool().unflatten(-1, grid).repeat_interleave(size, 1).repeat_interleave(size, 2)[:, None]
            errors = (reconstruction.float() - pixel_values.float()).abs().masked_fill(~mask, 0)
            masked_patches = kwargs.get("num_items_in_batch")
            if masked_patches is None:
                masked_patches = bool_masked_pos.bool().sum().clamp(min=1)
            loss = errors.sum() / (masked_patches * size**2 * self.config.num_channels)
        return MaskedImageModelingOutput(loss, reconstruction, outputs.hidden_states, outputs.attentions)


def _for_encoder(kwargs: dict) -> dict:
    """The keyword arguments of a head that go on to the encoder, which always answers with an output class."""
    return {name: value for name, value in kwargs.items() if name != "num_items_in_batch"} | {"return_dict": True}


__all__ = [
    "LionForImageClassification",
    "LionForMaskedImageModeling",
    "LionForMaskedLM",
    "LionForMultipleChoice",
    "LionForQuestionAnswering",
    "LionForSequenceClassification",
    "LionForTokenClassification",
    "LionModel",
    "LionPreTrainedModel",
]
