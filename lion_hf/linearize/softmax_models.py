"""The softmax models that LION has a skeleton for: tables of names, checks, loading."""

import os
import re
from collections.abc import Collection

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from ..convert.errors import ConversionError, first_names
from ..convert.renaming import find_row
from .families import (
    CLASSIFIER,
    ENCODER_OF,
    FAMILIES,
    HEADS,
    NO_POOLER,
    POOLER,
)
from .sources import check_parameters, read_config, read_weights, source_folder, weight_files

# Settings with which theirs is not LION's skeleton: name -> the only value that is.
NEEDED_SETTINGS = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
# How a model computes and gives its outputs, which changes none of them: what learning needs.
PLAIN_OUTPUTS = {"return_dict": True, "output_attentions": False, "chunk_size_feed_forward": 0}
# Parts of a checkpoint, by the beginnings of their names, that another head of the same network
# has; and buffers of old ones.
OTHER_HEADS = re.compile(
    r"(\w+\.)?pooler\.|cls\.|lm_head\.|\w*classifier\.|qa_outputs\.|decoder\.|vocab_\w+\."
    r"|generator_\w+\.|discriminator_predictions\.|sequence_summary\.|.*position_ids$"
)


def load_softmax_model(
    source: str | os.PathLike, subfolder: str = ""
) -> tuple[PreTrainedModel, list[str]]:
    """A checkpoint that can be linearized, in float32, and notes about parts left out.

    Args:
        source: folder or Hub name.
        subfolder: the folder inside it that holds the model.

    Raises:
        ConversionError: if there is none, or it has settings or a head that LION lacks, or lacks
            weights.
    """
    folder = source_folder(source) / subfolder
    config = read_config(folder, FAMILIES)
    architecture = (config.architectures or [None])[0]
    architecture = ENCODER_OF.get(architecture, architecture)
    check_softmax_config(config, architecture)
    for name, value in PLAIN_OUTPUTS.items():
        setattr(config, name, value)
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
    refuse_names(f"{source} has weights of other shapes than config.json says", shapes)
    # classifiers read the pooler
    reads_pooler = not CLASSIFIER.keys().isdisjoint(HEADS[architecture].rows)
    spare = "(?!)" if reads_pooler else r"(\w+\.)?pooler\."
    missing = sorted(name for name in info["missing_keys"] if not re.match(spare, name))
    refuse_names(f"{source} lacks weights of {architecture}", missing)
    unknown = sorted(name for name in info["unexpected_keys"] if not OTHER_HEADS.match(name))
    refuse_names(f"{source} has weights that {architecture} does not know", unknown)
    notes = []
    if len(missing) < len(info["missing_keys"]) and HEADS[architecture].rows == POOLER:
        notes.append(NO_POOLER)
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
    """Raises ConversionError, naming the setting, if LION has no skeleton for a model."""
    if config.model_type not in FAMILIES:
        raise ConversionError(
            f"model_type={config.model_type!r}: expected one of {tuple(FAMILIES)}"
        )
    if getattr(config, "pad_token_id", 0) is None:
        raise ConversionError(
            "pad_token_id=None: expected a number, because padding has a row in the embeddings"
        )
    family = FAMILIES[config.model_type]
    legal = tuple(f"{family.classes}{suffix}" for suffix in family.heads)
    if architecture not in legal:
        found = config.architectures or architecture  # config.architectures may be unset
        raise ConversionError(
            f"architectures={found}: expected one of {legal}, which LION has the heads for"
        )
    for name, needed in {**NEEDED_SETTINGS, **family.needed}.items():
        value = getattr(config, name, needed)
        if value != needed:
            raise ConversionError(
                f"{name}={value!r}: expected {needed!r}, because LION has nothing of the kind"
            )
    if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
        raise ConversionError(
            f"embedding_size={config.embedding_size}: expected hidden_size={config.hidden_size}"
        )
    activation = family.settings(config).get("hidden_act") or config.hidden_act
    if activation not in ACT2FN:
        raise ConversionError(f"hidden_act={activation!r}: expected one of {sorted(ACT2FN)}")
    if any(True for _ in ACT2FN[activation].parameters()):
        raise ConversionError(
            f"hidden_act={activation!r}: expected an activation without weights, because none are"
            " copied"
        )
    if family.gelu_decoder and architecture.endswith("ForMaskedLM") and activation != "gelu":
        raise ConversionError(
            f"hidden_act={activation!r} with {architecture}: expected 'gelu', because its head has"
            " gelu whatever hidden_act says, and LION's has hidden_act"
        )
    if family.modality == "image":
        _check_patches(config, architecture)


def _check_patches(config: PreTrainedConfig, architecture: str) -> None:
    sides = config.patch_size
    sides = sides if isinstance(sides, list | tuple) else [sides]
    if len(set(sides)) > 1:
        raise ConversionError(f"patch_size={config.patch_size}: expected a square")
    if architecture.endswith("ForMaskedImageModeling") and config.encoder_stride != sides[0]:
        raise ConversionError(
            f"encoder_stride={config.encoder_stride}: expected patch_size={sides[0]}, LION's only"
            " one"
        )


def source_name(name: str, teacher: PreTrainedModel) -> str:
    """The teacher's name for one of our tensors or modules.

    Args:
        name: ours in a model with a head, such as "lion.layers.0.mlp.fc1".
        teacher: the softmax model.

    Raises:
        KeyError: if the teacher has none.
    """
    rows = {**FAMILIES[teacher.config.model_type].rows, **HEADS[type(teacher).__name__].rows}
    row, place = find_row(name, rows)
    return theirs_in(row, place.layer, teacher) + place.leaf


def theirs_in(row: str, layer: str | int, teacher: PreTrainedModel) -> str:
    """The teacher's name for a row of its family's table."""
    prefix = teacher.base_model_prefix
    theirs = row.format(base=prefix, n=layer)
    return theirs.removeprefix(f"{prefix}.") if teacher.base_model is teacher else theirs


def refuse_names(fault: str, names: Collection[str]) -> None:
    """Raises ConversionError with the fault and the first names, if there are any."""
    if names:
        raise ConversionError(f"{fault}: {first_names(names)}")
