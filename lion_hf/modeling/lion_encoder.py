"""The encoder for text and images, without a head."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_lion import LionConfig
from .lion_convolution import Grid, convolution_layout, packed_layout
from .lion_embeddings import LionImageEmbeddings, LionTextEmbeddings
from .lion_layers import LionLayer, LionPooler
from .lion_long import PIECE, LionLongOutput, encode_long, encode_row, goes_in_pieces
from .lion_numerics import values_known
from .lion_orders import packed_orders
from .lion_packing import check_rows, document_indices, repad, unpad
from .lion_pretrained import LionPreTrainedModel


class EmbeddedRows(NamedTuple):
    """What the layers of the encoder get."""

    hidden_states: torch.Tensor  # (B, L, hidden), or (1, tokens, hidden) without padding
    for_layers: dict[str, Any]  # keyword arguments of every layer
    places: torch.Tensor | None = None  # of the tokens in the batch, if padding was taken out
    shape: tuple[int, int] = (0, 0)  # (B, L) of the batch
    lengths: list[int] | None = None  # tokens of each image, if images are packed into one row
    not_finite: torch.Tensor | None = None  # tokens of packed images that are not finite, (1, T, 1)


def _last_states_of_texts(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Lets the last of a text model's `hidden_states` be `last_hidden_state`.

    So it is in every text model of transformers, unless `config.tie_last_hidden_states` says no. In
    image models it is what the last norm reads.
    """

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        outputs = forward(self, *args, **kwargs, return_dict=True)
        states = outputs.hidden_states
        tied = getattr(self.config, "tie_last_hidden_states", None) is not False
        if self.config.modality == "text" and tied and states and states[-1] is not None:
            outputs["hidden_states"] = (*states[:-1], outputs.last_hidden_state)
        return outputs.to_tuple() if return_dict is False else outputs

    return wrapper


class LionModel(LionPreTrainedModel):
    """The encoder: text or patch embeddings, layers, with `pre_norm` a last norm, and a pooler.

    Args:
        add_pooling_layer: whether to compute `pooler_output`.
        use_mask_token: whether an image model has the token that replaces masked patches.
    """

    input_modalities = ("text", "image")

    def __init__(
        self, config: LionConfig, add_pooling_layer: bool = True, use_mask_token: bool = False
    ):
        super().__init__(config)
        text, depth = config.modality == "text", config.num_hidden_layers
        self.embeddings: Any  # of texts or of images
        if text:
            self.embeddings = LionTextEmbeddings(config)
        else:
            self.embeddings = LionImageEmbeddings(config, use_mask_token)
        rates = [config.drop_path_rate * n / max(depth - 1, 1) for n in range(depth)]
        self.layers = nn.ModuleList([LionLayer(config, rate) for rate in rates])
        norm = None
        if config.pre_norm:
            norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # Under one name, transformers would take it for the masked-LM head's norm when it loads.
        self.norm: nn.Module | None = None if text else norm
        self.last_norm = norm if text else None
        self.pooler = LionPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.embeddings, self._input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.embeddings, self._input_embeddings(), value)

    def _input_embeddings(self) -> str:
        return "word_embeddings" if self.config.modality == "text" else "patch_embeddings"

    def _check_modality(self, texts: dict, images: dict) -> None:
        """Raises ValueError for an input of the other modality, which nothing would read."""
        if self.config.modality == "text":
            takes, others = "a text model takes either input_ids or inputs_embeds", images
        else:
            takes, others = "an image model takes pixel_values", texts
        for name, x in others.items():
            if x is not None:
                raise ValueError(f"{takes} (and no {name})")

    def _may_unpad(self, kwargs: dict) -> bool:
        """Whether padding may be taken out.

        It may in "auto" form, if nobody looks at the layers' outputs or needs their scores.
        """
        outputs = ("output_attentions", "output_hidden_states")
        recorded = any(kwargs.get(name, getattr(self.config, name)) for name in outputs)
        scores = self.training and self.config.attention_probs_dropout_prob > 0
        return self.config.attention_form == "auto" and not (recorded or scores)

    @merge_with_config_defaults
    @_last_states_of_texts
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
        max_length_q: int | torch.Tensor | None = None,
        max_length_k: int | torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encodes a batch.

        Args:
            input_ids: ids of tokens, (B, L); text models.
            attention_mask: (B, L), 1 for tokens and 0 for padding, which may be anywhere.
            token_type_ids: (B, L), zeros if None.
            position_ids: (B or 1, L). Where they restart, a new document begins, which does not see
                the others.
            inputs_embeds: (B, L, hidden) in place of `input_ids`.
            pixel_values: (B, channels, height, width); image models. With `spatial_shapes` the
                patches of all images, (patches, patch_size * patch_size * channels), as
                `LionImageProcessor` makes them with `native_resolution`.
            bool_masked_pos: (B, patches), nonzero where the mask token replaces a patch.
            seq_idx: (B or 1, L), integers that change where a new document begins.
            cu_seq_lens_q: offsets of the documents, (documents + 1,) in one flat row (B = 1), or
                (B, documents + 1) in every row, where the last offset may be repeated.
            cu_seq_lens_k: the same; collators pass both.
            max_length_q: not read. Named because collators pass it beside the offsets.
            max_length_k: not read.
            spatial_shapes: rows and columns of patches of each image, (images, 2), for images of
                different sizes, which are packed into one row and do not see each other.
            **kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Returns:
            `last_hidden_state` (B, L, hidden), not to be read at padding, and `pooler_output`
            (B, hidden), which knows nothing of packed texts. With `spatial_shapes` they are
            (1, tokens of all images, hidden), where 1 + rows * columns tokens belong to an image,
            and (images, hidden). With `output_attentions` also the layers'
            mixing matrices, (B, heads, L, L), in any form.

        Raises:
            ValueError: for inputs of the other modality, both or none of `input_ids` and
                `inputs_embeds`, an image size that the patch does not divide, or a mask of another
                length.
        """
        texts = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "seq_idx": seq_idx,
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
        }
        images = {
            "pixel_values": pixel_values,
            "bool_masked_pos": bool_masked_pos,
            "spatial_shapes": spatial_shapes,
        }
        self._check_modality(texts, images)
        if self.config.modality == "text":
            may_unpad = self._may_unpad(kwargs)
            shape = check_rows(self.config.hidden_size, **texts)
            if input_ids is not None and goes_in_pieces(self, may_unpad, **texts):
                return encode_row(self, input_ids)
            rows = self._embed_texts(shape, may_unpad, **texts)
        else:
            if pixel_values is None:
                raise ValueError("an image model takes pixel_values: expected a tensor, not None")
            rows = self._embed_images(pixel_values, bool_masked_pos, spatial_shapes)
        recorded = kwargs.get("output_attentions", self.config.output_attentions) or False
        hidden_states = rows.hidden_states
        for layer in self.layers:
            hidden_states = layer(hidden_states, output_attentions=recorded, **rows.for_layers)
        if rows.places is not None:
            hidden_states = repad(hidden_states, rows.places, rows.shape)
        last_norm = self.last_norm or self.norm
        if last_norm is not None:
            hidden_states = last_norm(hidden_states)
        if rows.not_finite is not None:
            not_finite = rows.not_finite.to(hidden_states.device)
            hidden_states = hidden_states.masked_fill(not_finite, torch.nan)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(hidden_states, attention_mask, rows.lengths)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def encode_long(
        self,
        input_ids: torch.Tensor | Iterable,
        *,
        piece: int = PIECE,
        pooling: str | None = "mean",
        cache: str | os.PathLike | None = None,
        spans: int | Sequence[tuple[int, int]] | None = None,
        progress: bool | None = None,
    ) -> LionLongOutput:
        """Encodes one document of any length, piece by piece, exactly as `forward` does at once.

        Memory beside the weights holds the activations of one piece, the ids, and of one layer one
        state per head and piece. Hidden states of more than 512 MiB, or with `cache` all, are in
        files that are mapped into memory: two of L x hidden numbers, in the cache or the system's
        folder for temporary files. The model must be in evaluation. No gradients are computed.

        Args:
            input_ids: (1, L) or (L,), with the tokenizer's special tokens if the model wants them;
                or an iterable of ids, or of tensors or lists of ids, which is read once.
            piece: tokens per piece. The result does not depend on it but for rounding.
            pooling: "mean", "cls" for the first token, or None for all hidden states.
            cache: a folder. A call that was killed goes on from the last finished piece if it is
                made again, and a finished one is answered from the folder, with any pooling and
                spans. The folder keeps the last hidden states.
            spans: pairs (start, end) of tokens, the end excluded, or a number of tokens per window:
                the mean of the last hidden states of each is returned too (late chunking, arXiv
                2409.04701).
            progress: whether to show a progress bar; None: on a terminal.

        Returns:
            `pooled` (1, hidden), the plain mean or first hidden state; `pooler_output` (1, hidden),
            what the model's pooler makes of it, or None without pooler; with `spans`
            `span_embeddings` (1, spans, hidden). With pooling None also `last_hidden_state`
            (1, L, hidden), and `pooled` is that of `classifier_pooling`, so that `pooler_output` is
            the one of `forward`.

        Raises:
            ValueError: for an image model, a model in training, on several devices, with hooks on
                its parts or within `sequence_parallel`; no ids, ids out of range, more tokens than
                the model has learned positions, an illegal piece, pooling or span; a cache of
                another model, document, piece or precision, one that is in use or that cannot be
                written, or a disk without room for the hidden states.
        """
        return encode_long(
            self,
            input_ids,
            piece=piece,
            pooling=pooling,
            cache=cache,
            spans=spans,
            progress=progress,
        )

    def _embed_texts(
        self, shape: tuple[int, int], may_unpad: bool, **inputs: torch.Tensor | None
    ) -> EmbeddedRows:
        """The first hidden states of a batch of texts, without padding where that pays."""
        mask, position_ids = inputs["attention_mask"], inputs["position_ids"]
        if mask is not None and values_known(mask) and bool((mask != 0).all()):
            mask = None  # nothing is padding
        seq_idx, places = inputs["seq_idx"], None
        if seq_idx is None:
            cu_seq_lens = inputs["cu_seq_lens_q"], inputs["cu_seq_lens_k"]
            seq_idx = document_indices(shape, mask, position_ids, *cu_seq_lens)
        tokens = inputs["input_ids"], inputs["token_type_ids"], position_ids
        hidden_states = self.embeddings(*tokens, inputs["inputs_embeds"], mask, seq_idx)
        packed = None
        if mask is not None and may_unpad:
            packed = unpad(hidden_states, mask, seq_idx)
        if packed is not None:
            (hidden_states, seq_idx, places), mask = packed, None
        for_layers: dict[str, Any] = {"attention_mask": mask, "seq_idx": seq_idx}
        width = self.config.conv_kernel_size
        if width is not None:
            rows = hidden_states.shape[0], hidden_states.shape[1]
            for_layers["conv_layout"] = convolution_layout(width, rows, mask, seq_idx)
        return EmbeddedRows(hidden_states, for_layers, places, shape)

    def _embed_images(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None,
        spatial_shapes: torch.Tensor | None,
    ) -> EmbeddedRows:
        """The first hidden states of a batch of images."""
        if spatial_shapes is not None:
            if bool_masked_pos is not None:
                raise ValueError("bool_masked_pos with spatial_shapes: expected images of one size")
            return self._embed_packed_images(pixel_values, spatial_shapes)
        order = self.embeddings.reading_orders(pixel_values)
        grid = Grid(*self.embeddings.patch_grid(pixel_values))
        hidden_states = self.embeddings(pixel_values, bool_masked_pos)
        return EmbeddedRows(hidden_states, {"order": order, "conv_layout": grid})

    def _embed_packed_images(
        self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor
    ) -> EmbeddedRows:
        """The first hidden states of images of different sizes, in one row."""
        grids = self.embeddings.packed_grids(pixel_values, spatial_shapes)
        device = pixel_values.device
        packed = self.embeddings(pixel_values, None, grids)
        for_layers: dict[str, Any] = {"order": packed_orders(self.config, grids, device)}
        if len(grids) == 1:
            for_layers["conv_layout"] = grids[0]
        else:
            for_layers["seq_idx"] = packed.seq_idx
            width = self.config.conv_kernel_size
            if width is not None:
                for_layers["conv_layout"] = packed_layout(width, grids, device)
        lengths = [1 + rows * columns for rows, columns in grids]
        hidden_states, _, not_finite = packed
        return EmbeddedRows(hidden_states, for_layers, lengths=lengths, not_finite=not_finite)


__all__ = ["LionModel"]
