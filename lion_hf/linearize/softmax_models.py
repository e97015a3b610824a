"""The softmax models that LION has a skeleton for: tables of names, checks, loading."""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from ..convert.errors import ConversionError
from ..convert.renaming import find_row
from .sources import check_parameters, read_config, read_weights, source_folder, weight_files

BERT_LAYER = "{base}.encoder.layer.{n}"
VIT_LAYER = "{base}.layers.{n}"

# Our name -> that of transformers. A row names a tensor, or a module with all its tensors; {base} is "bert", "vit", ...
ENCODERS = {
    "text": {
        "lion.embeddings.word_embeddings": "{base}.embeddings.word_embeddings",
        "lion.embeddings.token_type_embeddings": "{base}.embeddings.token_type_embeddings",
        "lion.embeddings.position_embeddings": "{base}.embeddings.position_embeddings",
        "lion.embeddings.norm": "{base}.embeddings.LayerNorm",
        "lion.layers.{n}.attention.q_proj": f"{BERT_LAYER}.attention.self.query",
        "lion.layers.{n}.attention.k_proj": f"{BERT_LAYER}.attention.self.key",
        "lion.layers.{n}.attention.v_proj": f"{BERT_LAYER}.attention.self.value",
        "lion.layers.{n}.attention.o_proj": f"{BERT_LAYER}.attention.output.dense",
        "lion.layers.{n}.attention_norm": f"{BERT_LAYER}.attention.output.LayerNorm",
        "lion.layers.{n}.mlp.fc1": f"{BERT_LAYER}.intermediate.dense",
        "lion.layers.{n}.mlp.fc2": f"{BERT_LAYER}.output.dense",
        "lion.layers.{n}.mlp_norm": f"{BERT_LAYER}.output.LayerNorm",
    },
    "image": {
        "lion.embeddings.cls_token": "{base}.embeddings.cls_token",
        "lion.embeddings.position_embeddings": "{base}.embeddings.position_embeddings",
        "lion.embeddings.patch_embeddings": "{base}.embeddings.patch_embeddings.projection",
        "lion.layers.{n}.attention_norm": f"{VIT_LAYER}.layernorm_before",
        "lion.layers.{n}.attention.q_proj": f"{VIT_LAYER}.attention.q_proj",
        "lion.layers.{n}.attention.k_proj": f"{VIT_LAYER}.attention.k_proj",
        "lion.layers.{n}.attention.v_proj": f"{VIT_LAYER}.attention.v_proj",
        "lion.layers.{n}.attention.o_proj": f"{VIT_LAYER}.attention.o_proj",
        "lion.layers.{n}.mlp_norm": f"{VIT_LAYER}.layernorm_after",
        "lion.layers.{n}.mlp.fc1": f"{VIT_LAYER}.mlp.fc1",
        "lion.layers.{n}.mlp.fc2": f"{VIT_LAYER}.mlp.fc2",
        "lion.norm": "{base}.layernorm",
    },
}
POOLER = {"lion.pooler.dense": "{base}.pooler.dense"}
CLASSIFIER = {"classifier": "classifier"}
ANSWERS = {"qa_outputs": "qa_outputs"}
BERT_WORDS = {
    "dense": "cls.predictions.transform.dense",
    "norm": "cls.predictions.transform.LayerNorm",
    "decoder": "cls.predictions.decoder",
}
ROBERTA_WORDS = {
    "dense": "lm_head.dense",
    "norm": "lm_head.layer_norm",
    "decoder": "lm_head.decoder",
}
ROBERTA_CLASSIFIER = {"lion.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}
PIXELS = {"lion.embeddings.mask_token": "{base}.embeddings.mask_token", "decoder": "decoder.0"}


class Head(NamedTuple):
    """What a class of transformers becomes: our class, and the rows that it adds to its encoder's."""

    lion: str
    rows: dict[str, str]


HEADS = {
    "BertModel": Head("LionModel", POOLER),
    "BertForMaskedLM": Head("LionForMaskedLM", BERT_WORDS),
    "BertForPreTraining": Head("LionForMaskedLM", BERT_WORDS),
    "BertForSequenceClassification": Head("LionForSequenceClassification", POOLER | CLASSIFIER),
    "BertForTokenClassification": Head("LionForTokenClassification", CLASSIFIER),
    "BertForQuestionAnswering": Head("LionForQuestionAnswering", ANSWERS),
    "BertForMultipleChoice": Head("LionForMultipleChoice", POOLER | CLASSIFIER),
    "RobertaModel": Head("LionModel", POOLER),
    "RobertaForMaskedLM": Head("LionForMaskedLM", ROBERTA_WORDS),
    "RobertaForSequenceClassification": Head("LionForSequenceClassification", ROBERTA_CLASSIFIER),
    "RobertaForTokenClassification": Head("LionForTokenClassification", CLASSIFIER),
    "RobertaForQuestionAnswering": Head("LionForQuestionAnswering", ANSWERS),
    "RobertaForMultipleChoice": Head("LionForMultipleChoice", POOLER | CLASSIFIER),
    "ViTModel": Head("LionModel", {}),
    "ViTForImageClassification": Head("LionForImageClassification", CLASSIFIER),
    "ViTForMaskedImageModeling": Head("LionForMaskedImageModeling", PIXELS),
    "DeiTModel": Head("LionModel", {}),
    "DeiTForImageClassification": Head("LionForImageClassification", CLASSIFIER),
    "DeiTForImageClassificationWithTeacher": Head(
        "LionForImageClassification", {"classifier": "cls_classifier"}
    ),
    "DeiTForMaskedImageModeling": Head("LionForMaskedImageModeling", PIXELS),
}
MODEL_TYPES = {"bert": "text", "roberta": "text", "vit": "image", "deit": "image"}


def without_distillation_token(x: torch.Tensor) -> torch.Tensor:
    """A sequence of DeiT, (B, 2 + patches, ...), without its second token, which LION does not have."""
    return torch.cat([x[:, :1], x[:, 2:]], dim=1)


# Tensors that change on their way: (model type, our name) -> from theirs and its configuration.
CHANGED: dict[tuple[str, str], Callable[[torch.Tensor, PreTrainedConfig], torch.Tensor]] = {
    # RoBERTa's positions begin behind that of the padding token
    ("roberta", "lion.embeddings.position_embeddings.weight"): lambda x, config: x[
        config.pad_token_id + 1 :
    ],
    ("deit", "lion.embeddings.position_embeddings"): lambda x, config: without_distillation_token(
        x
    ),
    # a convolution with a kernel of one pixel
    ("vit", "decoder.weight"): lambda x, config: x.flatten(1),
    ("deit", "decoder.weight"): lambda x, config: x.flatten(1),
}

# Settings with which theirs is not LION's skeleton: name -> the only value that is.
NEEDED_SETTINGS: dict[str, object] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
# Parts of a checkpoint, by the beginnings of their names, that another head of the same network has; and buffers of old ones.
OTHER_HEADS = re.compile(
    r"(\w+\.)?pooler\.|cls\.|lm_head\.|\w*classifier\.|qa_outputs\.|decoder\.|.*position_ids$"
)


def load_softmax_model(
    source: str | os.PathLike, subfolder: str = ""
) -> tuple[PreTrainedModel, list[str]]:
    """A checkpoint that can be linearised, in float32, and notes about parts of it that are left out.

    Args:
        source: folder or Hub name.
        subfolder: the folder inside it that holds the model.

    Raises:
        ConversionError: if there is none, or it has settings or a head that LION lacks, or lacks weights.
    """
    folder = source_folder(source) / subfolder
    config = read_config(folder, MODEL_TYPES)
    architecture = (config.architectures or [None])[0]
    check_softmax_config(config, architecture)
    cls = getattr(transformers, architecture)
    files = weight_files(source, folder, subfolder)
    check_parameters(config, cls, files)
    try:
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=read_weights(files),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    except Exception as error:  # torch and transformers raise whatever the weights lead to
        raise ConversionError(
            f"the weights of {source} cannot be loaded as {architecture}: {error}"
        ) from error
    shapes = [
        f"{name} {tuple(a)}, not {tuple(b)}" for name, a, b in sorted(info["mismatched_keys"])
    ]
    _refuse_names(f"{source} has weights of other shapes than config.json says", shapes)
    spare = (
        r"(\w+\.)?pooler\." if CLASSIFIER.keys().isdisjoint(HEADS[architecture].rows) else "(?!)"
    )  # classifiers read it
    missing = sorted(name for name in info["missing_keys"] if not re.match(spare, name))
    _refuse_names(f"{source} lacks weights of {architecture}", missing)
    unknown = sorted(name for name in info["unexpected_keys"] if not OTHER_HEADS.match(name))
    _refuse_names(f"{source} has weights that {architecture} does not know", unknown)
    notes = []
    if len(missing) < len(info["missing_keys"]) and cls.__name__ in ("BertModel", "RobertaModel"):
        notes.append("the source has no pooler: pooler_output is that of random weights.")
    left = sorted(
        {
            ".".join(name.split(".")[:2])
            for name in info["unexpected_keys"]
            if not name.endswith("position_ids")
        }
    )
    if left:
        notes.append(
            f"the source also has parts that {architecture} does not read: {', '.join(left)}."
        )
    return model.eval(), notes


def check_softmax_config(config: PreTrainedConfig, architecture: str | None) -> None:
    """Raises ConversionError, which names the setting, if a configuration is not that of LION's skeleton."""
    if config.model_type not in MODEL_TYPES:
        raise ConversionError(
            f"model_type={config.model_type!r}: expected one of {tuple(MODEL_TYPES)}"
        )
    legal = tuple(name for name in HEADS if name.lower().startswith(config.model_type))
    if architecture not in legal:
        found = (
            config.architectures or architecture
        )  # a class of one's own has a name, but its configuration may have none
        raise ConversionError(
            f"architectures={found}: expected one of {legal}, which LION has the heads for"
        )
    for name, needed in NEEDED_SETTINGS.items():
        value = getattr(config, name, needed)
        if value != needed:
            raise ConversionError(
                f"{name}={value!r}: expected {legal!r}, because LION has nothing of the kind"
            )
    if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
        raise ConversionError(
            f"embedding_size={config.embedding_size}: expected hidden_size={config.hidden_size}"
        )
    if config.hidden_act not in ACT2FN:
        raise ConversionError(f"hidden_act={config.hidden_act!r}: expected one of {sorted(ACT2FN)}")
    if architecture == "RobertaForMaskedLM" and config.hidden_act != "gelu":
        raise ConversionError(
            f"hidden_act={config.hidden_act!r} with RobertaForMaskedLM: expected 'gelu', because its head has gelu whatever"
            " hidden_act says, and LION's has hidden_act"
        )
    if config.model_type == "roberta" and config.pad_token_id is None:
        raise ConversionError(
            "pad_token_id=None with RoBERTa: expected a number, behind which its positions begin"
        )
    if MODEL_TYPES[config.model_type] == "image":
        sides = (
            config.patch_size
            if isinstance(config.patch_size, list | tuple)
            else [config.patch_size]
        )
        if len(set(sides)) > 1:
            raise ConversionError(f"patch_size={config.patch_size}: expected a square")
        if architecture.endswith("ForMaskedImageModeling") and config.encoder_stride != sides[0]:
            raise ConversionError(
                f"encoder_stride={config.encoder_stride}: expected patch_size={sides[0]}, LION's only one"
            )


def source_name(name: str, teacher: PreTrainedModel) -> str:
    """The teacher's name for one of our tensors or modules, as it is called behind a head ("lion.layers.0...")."""
    rows = ENCODERS[MODEL_TYPES[teacher.config.model_type]] | HEADS[type(teacher).__name__].rows
    row, place = find_row(name, rows)
    prefix = teacher.base_model_prefix
    theirs = row.format(base=prefix, n=place.layer) + place.leaf
    return theirs.removeprefix(f"{prefix}.") if teacher.base_model is teacher else theirs


def _refuse_names(fault: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ConversionError(f"{fault}: {', '.join(names[:5])}{more}")
