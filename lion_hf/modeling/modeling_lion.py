"""LION encoders for text and images (arXiv 2502.16249): their heads."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForTokenClassification
from transformers.modeling_outputs import (
    MaskedImageModelingOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .configuration_lion import LionConfig
from .lion_encoder import LionModel
from .lion_loss import (
    LionImageClassifierOutput,
    check_token_labels,
    choose_problem_type,
    classification_loss,
    masked_lm_loss,
    pixel_loss,
    span_loss,
)
from .lion_packing import flat_choices, pool, refuse_packing
from .lion_pretrained import LionPreTrainedModel


class LionForMaskedLM(LionPreTrainedModel):
    """The encoder with BERT's masked-LM head.

    It has a dense layer, activation, LayerNorm, and a decoder tied to the word embeddings.
    """

    _tied_weights_keys = {"decoder.weight": "lion.embeddings.word_embeddings.weight"}

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config, add_pooling_layer=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder: nn.Module = nn.Linear(config.hidden_size, config.vocab_size)
        self.loss_function = masked_lm_loss
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
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | torch.Tensor | None = None,
        max_length_k: int | torch.Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Takes the inputs of `LionModel`, and `labels` (B, L), -100 where there is none.

        Returns `logits` (B, L, V), and with `config.sparse_prediction` and labels only those of the
        labelled tokens, (labelled tokens, V).
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        packing = seq_idx, cu_seq_lens_q, cu_seq_lens_k
        outputs = self.lion(*inputs, **_for_encoder(kwargs, *packing))
        hidden_states = outputs.last_hidden_state
        labels, kwargs = check_token_labels(labels, hidden_states, self.config.vocab_size, kwargs)
        if labels is not None and self.config.sparse_prediction:
            labelled = labels != -100
            hidden_states, labels = hidden_states[labelled], labels[labelled]
        logits = self.decoder(self.norm(self.act(self.dense(hidden_states))))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
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
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | torch.Tensor | None = None,
        max_length_k: int | torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Takes the inputs of `LionModel`, one document per row, and `labels`.

        Labels are those of `classification_loss`. With `config.problem_type` None it is regression
        for one label, else classification for integer labels and multi-label classification for
        real ones, as everywhere in transformers; "single_label_classification" with real labels
        (B, C) is cross-entropy with soft targets. Returns `logits` (B, C).
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        packing = seq_idx, cu_seq_lens_q, cu_seq_lens_k
        refuse_packing(self, attention_mask, position_ids, *packing)
        outputs = self.lion(*inputs, **_for_encoder(kwargs, *packing))
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            kind = choose_problem_type(self.config.problem_type, self.num_labels, labels)
            loss = classification_loss(logits, labels, kind, kwargs.get("num_items_in_batch"))
            self.config.problem_type = kind
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class LionForTokenClassification(LionPreTrainedModel):
    """The encoder with dropout and a linear classifier on every token."""

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lion = LionModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        # transformers would choose it by the class's name, which a subclass may change
        self.loss_function = ForTokenClassification
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
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | torch.Tensor | None = None,
        max_length_k: int | torch.Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Takes the inputs of `LionModel`, and `labels` (B, L), -100 where there is none.

        Returns `logits` (B, L, C).
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        packing = seq_idx, cu_seq_lens_q, cu_seq_lens_k
        outputs = self.lion(*inputs, **_for_encoder(kwargs, *packing))
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
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | torch.Tensor | None = None,
        max_length_k: int | torch.Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Takes the inputs of `LionModel`, and the answers' first and last tokens (B,).

        Returns the logits of both, (B, L) each.
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        packing = seq_idx, cu_seq_lens_q, cu_seq_lens_k
        outputs = self.lion(*inputs, **_for_encoder(kwargs, *packing))
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            items = kwargs.get("num_items_in_batch")
            loss = span_loss(start_logits, end_logits, start_positions, end_positions, items)
        return QuestionAnsweringModelOutput(
            loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions
        )


class LionForMultipleChoice(LionPreTrainedModel):
    """The encoder with a linear score of the pooled text, compared between a question's choices."""

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
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | torch.Tensor | None = None,
        max_length_k: int | torch.Tensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Takes inputs (B, choices, L), one document per choice, and the right choices.

        `labels` are (B,). Returns `logits` (B, choices).
        """
        rows = flat_choices(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            seq_idx=seq_idx,
        )
        packing = rows["seq_idx"], cu_seq_lens_q, cu_seq_lens_k
        refuse_packing(self, rows["attention_mask"], rows["position_ids"], *packing)
        outputs = self.lion(**rows, **_for_encoder(kwargs))
        choices = next(x.shape[1] for x in (input_ids, inputs_embeds) if x is not None)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, choices)
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = classification_loss(logits, labels, "single_label_classification", items)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class LionForImageClassification(LionPreTrainedModel):
    """The encoder with a linear classifier on the pooled image."""

    input_modalities, main_input_name = ("image",), "pixel_values"

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lion = LionModel(config)
        self.classifier: nn.Module = nn.Linear(config.hidden_size, config.num_labels)
        self.distiller = None
        if config.distillation_head:
            self.distiller = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs,
    ) -> LionImageClassifierOutput:
        """Takes images (B, channels, height, width), and the labels of `classification_loss`.

        Images of different sizes come as patches with `spatial_shapes` (images, 2), as
        `LionModel` takes them.

        With `config.problem_type` None it is regression for one label, else classification; real
        labels (B, C) are soft targets. The loss is the classifier's. Returns `logits` (B, C), which
        outside of training are the mean with `distillation_logits`, if there are any.
        """
        images = {"pixel_values": pixel_values, "spatial_shapes": spatial_shapes}
        outputs = self.lion(**images, **_for_encoder(kwargs))
        logits = self.classifier(outputs.pooler_output)
        distilled = None
        if self.distiller is not None:
            lengths = None if spatial_shapes is None else (1 + spatial_shapes.prod(1)).tolist()
            distilled = self.distiller(pool(outputs.last_hidden_state, None, "cls", lengths))
            logits = logits if self.training else (logits + distilled) / 2
        loss = None
        if labels is not None:
            kind = choose_problem_type(self.config.problem_type, self.num_labels)
            loss = classification_loss(logits, labels, kind, kwargs.get("num_items_in_batch"))
        return LionImageClassifierOutput(
            loss, logits, outputs.hidden_states, outputs.attentions, distilled
        )


class LionForMaskedImageModeling(LionPreTrainedModel):
    """The encoder with SimMIM's decoder (arXiv 2111.09886).

    It reads every patch's pixels from its token. The loss is L1 on masked patches.
    """

    input_modalities, main_input_name = ("image",), "pixel_values"

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Linear(config.hidden_size, config.patch_size**2 * config.num_channels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        **kwargs,
    ) -> MaskedImageModelingOutput:
        """Takes images (B, channels, height, width), and a mask (B, patches).

        Returns `reconstruction`, of the images' shape. The loss is the mean absolute error over the
        pixels of the masked patches; with `num_items_in_batch`, the masked patches of the whole
        accumulated batch, it is the sum divided by their pixels.
        """
        if kwargs.get("spatial_shapes") is not None:
            raise ValueError(
                "spatial_shapes with LionForMaskedImageModeling: expected images of one size"
            )
        outputs = self.lion(
            pixel_values=pixel_values, bool_masked_pos=bool_masked_pos, **_for_encoder(kwargs)
        )
        grid, size = self.lion.embeddings.patch_grid(pixel_values), self.config.patch_size
        # (B, channels * size^2, patches)
        pixels = self.decoder(outputs.last_hidden_state[:, 1:]).mT
        reconstruction = F.pixel_shuffle(pixels.unflatten(-1, grid), size)
        loss = None
        if bool_masked_pos is not None and pixel_values is not None:
            mask = bool_masked_pos.bool().unflatten(-1, grid)
            items = kwargs.get("num_items_in_batch")
            loss = pixel_loss(reconstruction, pixel_values, mask, items)
        return MaskedImageModelingOutput(
            loss, reconstruction, outputs.hidden_states, outputs.attentions
        )


def _for_encoder(kwargs: dict, seq_idx=None, cu_seq_lens_q=None, cu_seq_lens_k=None) -> dict:
    """The keyword arguments of a head that go on to the encoder.

    The encoder always answers with an output class.
    """
    passed = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
    packing = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
    given = {name: value for name, value in packing.items() if value is not None}
    return passed | given | {"return_dict": True}


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
