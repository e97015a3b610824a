"""The softmax families that LION has a skeleton for: one row of `FAMILIES` each."""

from __future__ import annotations  # `--help` names the families without loading torch

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import transformers
from packaging.version import Version

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# A tensor of ours from theirs, a way to get another of their tensors by its row, and their
# configuration.
Change: TypeAlias = (
    "Callable[[torch.Tensor, Callable[[str], torch.Tensor], PreTrainedConfig], torch.Tensor]"
)


class Head(NamedTuple):
    """What a class of transformers becomes: our class, and the rows of its head."""

    lion: str
    rows: Mapping[str, str]


class Family(NamedTuple):
    """A kind of softmax encoder.

    Args:
        modality: "text" or "image".
        classes: what the names of its classes begin with.
        rows: our names -> theirs. A row names a tensor, or a module with all its tensors; {base} is
            the name of the encoder inside a model with a head, {n} a layer's number.
        heads: what follows `classes` in the name of a class -> what it becomes.
        settings: fields of LionConfig from their configuration, where it does not have them under
            the same names.
        changes: our tensors that are not copied as they are, by their rows.
        zeros: our modules that theirs lacks, and that add nothing when they are zero.
        attention_output: row of the module that gives an attention's output, if it is not the
            output projection.
        needed: settings that must have these values.
        gelu_decoder: whether the masked language model's head has gelu whatever hidden_act says.
        second_token: whether a distillation token, which LION lacks, follows the class token.
        notes: what the user should know of each.
    """

    modality: str
    classes: str
    rows: Mapping[str, str]
    heads: Mapping[str, Head]
    settings: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    changes: Mapping[str, Change] = {}
    zeros: tuple[str, ...] = ()
    attention_output: str = "lion.layers.{n}.attention.o_proj"
    needed: Mapping[str, Any] = {}
    gelu_decoder: bool = False
    second_token: bool = False
    notes: tuple[str, ...] = ()


def _layers(theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    """Rows of a layer: our names inside a layer -> theirs inside a layer."""
    return {f"lion.layers.{{n}}.{ours}": f"{theirs}.{name}" for ours, name in names.items()}


def without_distillation_token(x: torch.Tensor) -> torch.Tensor:
    """A sequence of DeiT, (B, 2 + patches, ...), without its second token, which LION lacks."""
    import torch

    return torch.cat([x[:, :1], x[:, 2:]], dim=1)


def _behind_padding(x: torch.Tensor, _: Callable, config: PreTrainedConfig) -> torch.Tensor:
    """RoBERTa's positions, which begin behind that of the padding token."""
    return x[config.pad_token_id + 1 :]


def _scaled_by(row: str) -> Change:
    """A projection's weight or bias with the layer scale that follows it folded in."""

    def change(x: torch.Tensor, other: Callable[[str], torch.Tensor], _: Any) -> torch.Tensor:
        # the outputs are the first axis
        return x * other(row).view(-1, *[1] * (x.dim() - 1))

    return change


BERT_ROWS = {
    "lion.embeddings.word_embeddings": "{base}.embeddings.word_embeddings",
    "lion.embeddings.token_type_embeddings": "{base}.embeddings.token_type_embeddings",
    "lion.embeddings.position_embeddings": "{base}.embeddings.position_embeddings",
    "lion.embeddings.norm": "{base}.embeddings.LayerNorm",
    **_layers(
        "{base}.encoder.layer.{n}",
        {
            "attention.q_proj": "attention.self.query",
            "attention.k_proj": "attention.self.key",
            "attention.v_proj": "attention.self.value",
            "attention.o_proj": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
            "mlp_norm": "output.LayerNorm",
        },
    ),
}
DISTILBERT_ROWS = {
    name: row for name, row in BERT_ROWS.items() if "layers" not in name and "type" not in name
} | _layers(
    "{base}.transformer.layer.{n}",
    {
        "attention.q_proj": "attention.q_lin",
        "attention.k_proj": "attention.k_lin",
        "attention.v_proj": "attention.v_lin",
        "attention.o_proj": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "mlp.fc1": "ffn.lin1",
        "mlp.fc2": "ffn.lin2",
        "mlp_norm": "output_layer_norm",
    },
)
IMAGE_EMBEDDINGS = {
    "lion.embeddings.cls_token": "{base}.embeddings.cls_token",
    "lion.embeddings.position_embeddings": "{base}.embeddings.position_embeddings",
    "lion.embeddings.patch_embeddings": "{base}.embeddings.patch_embeddings.projection",
    "lion.norm": "{base}.layernorm",
}
PROJECTIONS = {
    f"attention.{name}": f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
}
VIT_ROWS = IMAGE_EMBEDDINGS | _layers(
    "{base}.layers.{n}",
    {
        "attention_norm": "layernorm_before",
        **PROJECTIONS,
        "mlp_norm": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
)
DINOV2_LAYER = "{base}.encoder.layer.{n}"
# transformers 5.17 has an older layout of Dinov2, whatever the names in the checkpoint.
DINOV2_PROJECTIONS = (
    PROJECTIONS
    if Version(transformers.__version__) >= Version("5.18")
    else {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
    }
)
DINOV2_ROWS = IMAGE_EMBEDDINGS | _layers(
    DINOV2_LAYER,
    {
        "attention_norm": "norm1",
        **DINOV2_PROJECTIONS,
        "mlp_norm": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
)

POOLER = {"lion.pooler.dense": "{base}.pooler.dense"}
CLASSIFIER = {"classifier": "classifier"}
PIXELS = {"lion.embeddings.mask_token": "{base}.embeddings.mask_token", "decoder": "decoder.0"}


def _words(dense: str, norm: str, decoder: str) -> Head:
    return Head("LionForMaskedLM", {"dense": dense, "norm": norm, "decoder": decoder})


BERT_WORDS = _words(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
)
TOKENS_AND_ANSWERS = {
    "ForTokenClassification": Head("LionForTokenClassification", CLASSIFIER),
    "ForQuestionAnswering": Head("LionForQuestionAnswering", {"qa_outputs": "qa_outputs"}),
}
BERT_HEADS = {
    "Model": Head("LionModel", POOLER),
    "ForMaskedLM": BERT_WORDS,
    "ForPreTraining": BERT_WORDS,
    "ForSequenceClassification": Head("LionForSequenceClassification", POOLER | CLASSIFIER),
    **TOKENS_AND_ANSWERS,
    "ForMultipleChoice": Head("LionForMultipleChoice", POOLER | CLASSIFIER),
}
ROBERTA_HEADS = {
    "Model": Head("LionModel", POOLER),
    "ForMaskedLM": _words("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    "ForSequenceClassification": Head(
        "LionForSequenceClassification",
        {"lion.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"},
    ),
    **TOKENS_AND_ANSWERS,
    "ForMultipleChoice": Head("LionForMultipleChoice", POOLER | CLASSIFIER),
}
VIT_HEADS = {
    "Model": Head("LionModel", {}),
    "ForImageClassification": Head("LionForImageClassification", CLASSIFIER),
    "ForMaskedImageModeling": Head("LionForMaskedImageModeling", PIXELS),
}
ONE_PIXEL_KERNEL: dict[str, Change] = {"decoder.weight": lambda x, other, config: x.flatten(1)}
NO_POOLER = "the source has no pooler: pooler_output is that of random weights."

ROBERTA = Family(
    "text",
    "Roberta",
    BERT_ROWS,
    ROBERTA_HEADS,
    settings=lambda config: {
        "max_position_embeddings": config.max_position_embeddings - config.pad_token_id - 1
    },
    changes={"lion.embeddings.position_embeddings.weight": _behind_padding},
    gelu_decoder=True,
)

# model_type of transformers -> family
FAMILIES = {
    "bert": Family("text", "Bert", BERT_ROWS, BERT_HEADS),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA._replace(classes="XLMRoberta"),
    "camembert": ROBERTA._replace(classes="Camembert"),
    "distilbert": Family(  # its classifiers have relu where LION's pooler has tanh
        "text",
        "DistilBert",
        DISTILBERT_ROWS,
        {
            "Model": Head("LionModel", {}),
            "ForMaskedLM": _words("vocab_transform", "vocab_layer_norm", "vocab_projector"),
            **TOKENS_AND_ANSWERS,
        },
        settings=lambda config: {
            "intermediate_size": config.hidden_dim,
            "hidden_act": config.activation,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "layer_norm_eps": 1e-12,
            "type_vocab_size": 2,
        },
        zeros=("lion.embeddings.token_type_embeddings.weight",),
        notes=(NO_POOLER,),
    ),
    "electra": Family(  # its classifiers have gelu where LION's pooler has tanh
        "text",
        "Electra",
        BERT_ROWS,
        {
            "Model": Head("LionModel", {}),
            "ForMaskedLM": _words(
                "generator_predictions.dense",
                "generator_predictions.LayerNorm",
                "generator_lm_head",
            ),
            **TOKENS_AND_ANSWERS,
        },
        gelu_decoder=True,
        notes=(NO_POOLER,),
    ),
    "vit": Family("image", "ViT", VIT_ROWS, VIT_HEADS, changes=ONE_PIXEL_KERNEL),
    "deit": Family(
        "image",
        "DeiT",
        VIT_ROWS,
        VIT_HEADS
        | {
            "ForImageClassificationWithTeacher": Head(
                "LionForImageClassification", {"classifier": "cls_classifier"}
            )
        },
        changes=ONE_PIXEL_KERNEL
        | {
            "lion.embeddings.position_embeddings": lambda x, other, config: (
                without_distillation_token(x)
            )
        },
        second_token=True,
        notes=(
            "DeiT's distillation token, its position and its classifier are left out: LION reads"
            " the"
            " class token.",
        ),
    ),
    "dinov2": Family(
        "image",
        "Dinov2",
        DINOV2_ROWS,
        {"Model": Head("LionModel", {})},
        settings=lambda config: {"intermediate_size": int(config.hidden_size * config.mlp_ratio)},
        changes={
            f"lion.layers.{{n}}.{module}.{part}": _scaled_by(f"{DINOV2_LAYER}.{scale}.lambda1")
            for module, scale in (("attention.o_proj", "layer_scale1"), ("mlp.fc2", "layer_scale2"))
            for part in ("weight", "bias")
        },
        attention_output=f"{DINOV2_LAYER}.layer_scale1",
        needed={"use_swiglu_ffn": False},
    ),
}

MODEL_TYPES = {name: family.modality for name, family in FAMILIES.items()}
HEADS = {
    f"{family.classes}{suffix}": head
    for family in FAMILIES.values()
    for suffix, head in family.heads.items()
}
# Classes whose head LION lacks, but whose encoder is worth having -> the class to load instead.
ENCODER_OF = {"ElectraForPreTraining": "ElectraModel"}
