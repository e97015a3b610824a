"""Copies a softmax encoder into LION.

The families of `families.py` differ from LION in the attention only. Everything else is copied;
LION's gates are new.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..convert.errors import ConversionError
from ..convert.renaming import find_row
from ..modeling import modeling_lion
from ..modeling.configuration_lion import LONGEST_TEXT, LionConfig
from ..modeling.lion_layers import LionDecay, LionGate
from ..modeling.modeling_lion import LionPreTrainedModel
from .families import FAMILIES, HEADS, NO_POOLER
from .settings import Copying
from .softmax_models import check_softmax_config, refuse_names, source_name, theirs_in

# Fields of LionConfig that mean the same in theirs.
SAME_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "id2label",
    "label2id",
    "problem_type",
)
SAME_TEXT_FIELDS = (
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_token_id",
    "classifier_dropout",
    "tie_word_embeddings",
)
SAME_IMAGE_FIELDS = ("image_size", "patch_size", "num_channels", "qkv_bias")
# Fields that some configurations have and others not: of sentence-transformers, and for pooling
# over layers.
OPTIONAL_FIELDS = (
    "sentence_transformers",
    "sbert_ce_default_activation_function",
    "output_hidden_states",
)
POOLER_ROW = "lion.pooler.dense"
SPECIAL_TOKENS = 2  # of a text, the first and the last
# Parameters that softmax attention has nothing to copy into.
NEW = (".attention.gate.", ".attention.norm.", "_conv.")


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
    """A LION model with the weights of a softmax model, and notes about what LION lacks.

    Args:
        teacher: of one of the classes in `HEADS`. It stays as it is.
        **options: fields of `Copying`; what is not of the model is not read.

    Raises:
        ConversionError: for a teacher that LION has no skeleton or head for, or options that do not
            fit.
    """
    copying = _copying(options)
    theirs, architecture = teacher.config, type(teacher).__name__
    check_softmax_config(theirs, architecture)
    if copying.window is not None:
        check_window(copying, theirs)
    copying = copying.resolved(FAMILIES[theirs.model_type].modality)
    config = _config(theirs, copying)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(copying.seed)
        student = getattr(modeling_lion, HEADS[architecture].lion)(config)

    weights, expected = _weights(teacher, student), student.state_dict()
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name} would have shape {tuple(tensor.shape)}: expected"
                f" {tuple(expected[name].shape)}"
            )
    student.load_state_dict(weights, strict=False)
    student.tie_weights()
    if copying.max_position_embeddings:  # behind the draw of the gates, which do not depend on it
        repeat_positions(student, copying.max_position_embeddings, copying.window)
    sharpen(student, copying.sharpness)
    if copying.half_life:
        set_half_life(student, copying.half_life)
    return student.eval(), _notes(teacher)


def repeat_positions(model: LionPreTrainedModel, longest: int, window: int | None = None) -> None:
    """Repeats the positions of the source's window behind it until there are enough, in place.

    A document then has the positions of its windows, read one by one: between two special tokens,
    whose positions are left out of the repetition. Behind the window the source's own positions are
    replaced too: a document is nearer to its windows without them
    (benchmarks/results/linearize.md).

    Args:
        model: a copy with the source's positions.
        longest: how many positions there are to be.
        window: tokens that the source reads at once; as many as it has positions if not given.
    """
    embeddings = model.base_model.embeddings
    own = embeddings.position_embeddings.weight.detach()
    window = min(window or len(own), len(own))
    source = torch.arange(longest)
    beyond = source >= window
    source[beyond] = (source[beyond] - 1) % max(window - SPECIAL_TOKENS, 1) + min(window - 1, 1)
    embeddings.position_embeddings = nn.Embedding.from_pretrained(own[source], freeze=False)
    model.config.max_position_embeddings = longest


def _notes(teacher: PreTrainedModel) -> list[str]:
    """What of a teacher is left out."""
    architecture, family = type(teacher).__name__, FAMILIES[teacher.config.model_type]
    notes = [x for x in family.notes if x != NO_POOLER or HEADS[architecture].lion == "LionModel"]
    if architecture == "BertForPreTraining":
        notes.append("the next-sentence head and the pooler are left out: LION has no such head.")
    if family.modality == "image" and getattr(teacher, "pooler", None) is not None:
        notes.append(
            "the pooler's dense layer is left out: LION's pooler_output of images is the class"
            " token"
            " as it is."
        )
    return notes


@torch.no_grad()
def sharpen(model: LionPreTrainedModel, sharpness: float) -> None:
    """Multiplies all queries and keys by a number, in the projections that they come from."""
    for layer in model.base_model.layers:
        for projection in (layer.attention.q_proj, layer.attention.k_proj):
            for parameter in projection.parameters():
                parameter.mul_(sharpness)


@torch.no_grad()
def set_half_life(model: LionPreTrainedModel, half_life: float) -> None:
    """Sets all gates to halve in this number of tokens. LION-lit has none.

    Those of LION-S also depend on the token, through weights that stay as they are.
    """
    rate = math.log(2) / half_life
    # the logit of exp(-rate), which itself may round to 0 or 1
    before_sigmoid = -rate - math.log(-math.expm1(-rate))
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
    family = FAMILIES[theirs.model_type]
    modality = family.modality
    names = SAME_FIELDS + (SAME_TEXT_FIELDS if modality == "text" else SAME_IMAGE_FIELDS)
    same = {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}
    same |= {name: getattr(theirs, name) for name in OPTIONAL_FIELDS if getattr(theirs, name, None)}
    same |= family.settings(theirs)
    if modality == "image" and not isinstance(theirs.patch_size, int):
        same["patch_size"] = theirs.patch_size[0]
    if copying.max_position_embeddings is not None:
        _check_longest(copying.max_position_embeddings, modality, same)
    try:
        return LionConfig(
            modality=modality,
            use_position_embeddings=True,
            classifier_pooling="cls",
            drop_path_rate=0.0,
            **same,
            conv_kernel_size=copying.conv_kernel_size or None,
            **{name: getattr(copying, name) for name in LION_FIELDS},
        )
    except Exception as error:  # the strict configuration raises classes of its own
        raise ConversionError(f"no LION model with these settings: {error}") from error


def source_positions(theirs: PreTrainedConfig) -> int | None:
    """Tokens that a source takes, which may be fewer than its positions; None for images."""
    settings = FAMILIES[theirs.model_type].settings(theirs)
    return {**theirs.to_dict(), **settings}.get("max_position_embeddings")


def check_window(copying: Copying, theirs: PreTrainedConfig, documents: bool = False) -> None:
    """Raises ConversionError for a window that a source does not have, or that changes nothing.

    Args:
        copying: with a window.
        theirs: the source's configuration.
        documents: whether the copy learns from long documents, which are read in windows.
    """
    window, longest = copying.window, source_positions(theirs)
    assert window is not None
    if longest is None:
        raise ConversionError(f"window={window}: expected none for images")
    if window > longest:
        raise ConversionError(f"window={window}: expected at most the source's {longest} tokens")
    if copying.max_position_embeddings is None and not documents:
        raise ConversionError(
            f"window={window} without max_position_embeddings: expected both, or none, because"
            " positions are repeated only behind the window of a copy that takes longer texts"
        )


def _check_longest(wanted: int, modality: str, same: Mapping[str, Any]) -> None:
    """Raises ConversionError for a number of positions that a copy cannot have."""
    if modality != "text":
        raise ConversionError(
            f"max_position_embeddings={wanted}: expected none for images, whose positions are"
            " interpolated"
        )
    least = same["max_position_embeddings"]
    if wanted < least:
        raise ConversionError(
            f"max_position_embeddings={wanted}: expected at least the source's {least}"
        )
    if wanted > max(LONGEST_TEXT, least):
        raise ConversionError(
            f"max_position_embeddings={wanted}: expected at most {LONGEST_TEXT}, the longest text"
            " that LION is tested with"
        )


def _weights(teacher: PreTrainedModel, student: LionPreTrainedModel) -> dict[str, torch.Tensor]:
    """The teacher's tensors under the student's names, after the check that none is missing."""
    family = FAMILIES[teacher.config.model_type]
    tensors, prefix = teacher.state_dict(), "lion." if student.base_model is student else ""
    ours = {
        f"{prefix}{name}": name
        for name in student.state_dict()
        if not _is_new(prefix + name, teacher)
    }
    plan = {name: source_name(name, teacher) for name in ours if name not in family.zeros}
    refuse_names(
        f"{type(teacher).__name__} has other weights than expected; missing",
        sorted({*plan.values()} - {*tensors}),
    )
    weights = {
        ours[name]: torch.zeros_like(student.state_dict()[ours[name]])
        for name in family.zeros
        if name in ours
    }
    for name, theirs in plan.items():
        tensor = tensors[theirs].detach().to("cpu", torch.float32)
        weights[ours[name]] = _changed(name, tensor, teacher, tensors)
    return weights


def _is_new(name: str, teacher: PreTrainedModel) -> bool:
    """Whether a parameter of ours has nothing of theirs to be copied from."""
    pooler = name.startswith("lion.pooler.")
    return any(x in name for x in NEW) or (
        pooler and POOLER_ROW not in HEADS[type(teacher).__name__].rows
    )


def _changed(
    name: str, tensor: torch.Tensor, teacher: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A tensor of theirs as ours, where it is not the same."""
    try:
        change, place = find_row(name, FAMILIES[teacher.config.model_type].changes)
    except KeyError:
        return tensor

    def other(row: str) -> torch.Tensor:
        return tensors[theirs_in(row, place.layer, teacher)].detach().to("cpu", torch.float32)

    return change(tensor, other, teacher.config)
