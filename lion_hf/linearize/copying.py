"""Softmax encoders of transformers to LION: `lion-hf linearize`, `linearize_checkpoint`, `linearize_model`.

BERT, RoBERTa, ViT and DeiT are LION's skeleton with another attention. Everything but that is copied; LION's gates are new.
"""

import math
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..convert.errors import ConversionError
from ..modeling import modeling_lion
from ..modeling.configuration_lion import LionConfig
from ..modeling.lion_layers import LionDecay, LionGate
from ..modeling.modeling_lion import LionPreTrainedModel
from .settings import Copying
from .softmax_models import (
    CHANGED,
    HEADS,
    MODEL_TYPES,
    _refuse_names,
    check_softmax_config,
    source_name,
)

# Fields of LionConfig that mean the same in theirs.
SAME_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "id2label", "label2id", "problem_type",
)  # fmt: skip
SAME_TEXT_FIELDS = (
    "vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id", "classifier_dropout", "tie_word_embeddings",
)  # fmt: skip
SAME_IMAGE_FIELDS = ("image_size", "patch_size", "num_channels", "qkv_bias")
# Fields that some configurations have and others not: of sentence-transformers, and for pooling over layers.
OPTIONAL_FIELDS = (
    "sentence_transformers",
    "sbert_ce_default_activation_function",
    "output_hidden_states",
)
NEW = (
    ".attention.gate.",
    ".attention.norm.",
)  # parameters that softmax attention has nothing to copy into


LION_FIELDS = (
    "mask_type",
    "attention_form",
    "patch_order",
    "feature_map",
    "normalize_attention",
    "attention_norm",
)


def linearize_model(
    teacher: PreTrainedModel, **options: Any
) -> tuple[LionPreTrainedModel, list[str]]:
    """A LION model with the weights of a softmax model of transformers, and notes about what LION lacks.

    Args:
        teacher: of one of the classes in `HEADS`. It stays as it is.
        **options: fields of `Copying`; what is not of the model is not read.

    Raises:
        ConversionError: for a teacher that LION has no skeleton or head for, or options that do not fit.
    """
    copying = _copying(options)
    theirs, architecture = teacher.config, type(teacher).__name__
    check_softmax_config(theirs, architecture)
    config = _config(theirs, copying)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(copying.seed)
        student = getattr(modeling_lion, HEADS[architecture].lion)(config)

    weights, expected = _weights(teacher, student), student.state_dict()
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name} would have shape {tuple(tensor.shape)}: expected {tuple(expected[name].shape)}"
            )
    student.load_state_dict(weights, strict=False)
    student.tie_weights()
    sharpen(student, copying.sharpness)
    if copying.half_life:
        set_half_life(student, copying.half_life)
    notes = []
    if theirs.model_type == "deit":
        notes.append(
            "DeiT's distillation token, its position and its classifier are left out: LION reads the class token."
        )
    if architecture == "BertForPreTraining":
        notes.append("the next-sentence head and the pooler are left out: LION has no such head.")
    if architecture in ("ViTModel", "DeiTModel") and teacher.pooler is not None:
        notes.append(
            "the pooler's dense layer is left out: LION's pooler_output of images is the class token as it is."
        )
    return student.eval(), notes


@torch.no_grad()
def sharpen(model: LionPreTrainedModel, sharpness: float) -> None:
    """Multiplies all queries and keys by a number, in the projections that they come from."""
    for layer in model.base_model.layers:
        for projection in (layer.attention.q_proj, layer.attention.k_proj):
            for parameter in projection.parameters():
                parameter.mul_(sharpness)


@torch.no_grad()
def set_half_life(model: LionPreTrainedModel, half_life: float) -> None:
    """Sets all gates, LION-S's where the token says nothing, to halve in this number of tokens; LION-lit has none."""
    rate = math.log(2) / half_life
    before_sigmoid = -rate - math.log(
        -math.expm1(-rate)
    )  # logit of exp(-rate), which may round to 0 or 1
    for module in model.modules():
        if isinstance(module, LionDecay | LionGate):
            module.bias.fill_(before_sigmoid if isinstance(module, LionDecay) else -before_sigmoid)


def _copying(options: dict[str, Any]) -> Copying:
    legal = [entry.name for entry in fields(Copying)]
    for name in options:
        if name not in legal:
            raise ConversionError(f"{name}={options[name]!r}: the options are {legal}")
    return Copying(**options)


def _config(theirs: PreTrainedConfig, copying: Copying) -> LionConfig:
    modality = MODEL_TYPES[theirs.model_type]
    names = SAME_FIELDS + (SAME_TEXT_FIELDS if modality == "text" else SAME_IMAGE_FIELDS)
    same = {name: getattr(theirs, name) for name in names}
    same |= {name: getattr(theirs, name) for name in OPTIONAL_FIELDS if getattr(theirs, name, None)}
    if theirs.model_type == "roberta":
        same["max_position_embeddings"] -= theirs.pad_token_id + 1
    if modality == "image" and not isinstance(theirs.patch_size, int):
        same["patch_size"] = theirs.patch_size[0]
    try:
        return LionConfig(
            modality=modality,
            use_position_embeddings=True,
            classifier_pooling="cls",
            drop_path_rate=0.0,
            **same,
            **{name: getattr(copying, name) for name in LION_FIELDS},
        )
    except Exception as error:  # the strict configuration raises classes of its own
        raise ConversionError(f"no LION model with these settings: {error}") from error


def _weights(teacher: PreTrainedModel, student: LionPreTrainedModel) -> dict[str, torch.Tensor]:
    """The teacher's tensors under the student's names, after the check that none is missing."""
    tensors, prefix = teacher.state_dict(), "lion." if student.base_model is student else ""
    plan = {
        name: source_name(prefix + name, teacher)
        for name in student.state_dict()
        if not any(x in name for x in NEW)
    }
    _refuse_names(
        f"{type(teacher).__name__} has other weights than expected; missing",
        sorted({*plan.values()} - {*tensors}),
    )
    weights = {}
    for name, theirs in plan.items():
        change = CHANGED.get((teacher.config.model_type, prefix + name))
        tensor = tensors[theirs].detach().to("cpu", torch.float32)
        weights[name] = tensor if change is None else change(tensor, teacher.config)
    return weights
