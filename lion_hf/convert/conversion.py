"""Turns checkpoints of the original LION code into folders for transformers.

What a file tells is read from its tensors' names and shapes and from the settings stored beside
them. What it cannot tell must be given as an option. A file is data: nothing in it is executed, and
all of it that is used is checked before anything is written.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..auto import image_processor, limit_length
from ..folders import check_new_folder, new_folder
from ..modeling import modeling_lion
from ..modeling.configuration_lion import CLASSIFIER_POOLINGS, LionConfig
from ..modeling.modeling_lion import LionPreTrainedModel
from ..training.finite import not_finite
from .errors import ConversionError, first_names
from .names import (
    FAMILY_MARKS,
    FAMILY_SETTING,
    FAMILY_WORDS,
    GATES,
    HEAD_DIM,
    HEADS,
    IMAGE_LAYER,
    NAMES,
    STORED_TEXT_SETTINGS,
    TEXT_LAYER,
    TOKENIZER_NOTE,
    UNUSED,
    Source,
)
from .reading import Original, read_checkpoint
from .renaming import find_row
from .tokenizer_files import check_words, read_tokenizer

MOST_LABELS = 100_000  # each of which gets a name; ImageNet-21K has 21,841


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote: the folder, the model's class and configuration, and notes."""

    folder: Path
    architecture: str
    config: LionConfig
    notes: tuple[str, ...]


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    num_attention_heads: int | None = None,
    classifier_pooling: str | None = None,
    use_ema: bool = False,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
) -> Conversion:
    """Converts a checkpoint of the original LION code into a folder for `from_pretrained`.

    Args:
        checkpoint: the file, from image training (`{"model": ..., "args": ...}`) or text training
            (`{"state": {"model": ...}}`). It is loaded without executing anything in it.
        output: the folder to write; it must not exist, or be empty. It appears only if all went
            well.
        num_attention_heads: needed for LION-lit where neither stored settings nor 64-wide heads
            tell it.
        classifier_pooling: "cls" (the original's `--cls_tok`) or "mean"; needed for images without
            stored arguments.
        use_ema: take the moving average of an image model's weights.
        tokenizer: tokenizer to write beside a text model, or its name or folder.

    Returns:
        The folder, the model's class name and configuration, and notes about what was assumed or is
        left to do.

    Raises:
        ConversionError: for a file that is not an original LION checkpoint, is damaged or holds
            other objects than weights and settings, an option that is missing or does not fit, or
            an output folder that is not empty.
    """
    output = check_new_folder(output)
    original = read_checkpoint(checkpoint, use_ema)
    architecture, config = _describe(original, num_attention_heads, classifier_pooling)
    model = _build(original, architecture, config)
    processor = _processor(original, config, tokenizer)

    with new_folder(output) as folder:
        model.save_pretrained(folder)
        if processor is not None:
            with limit_length(processor, model.config):
                processor.save_pretrained(folder)
    return Conversion(output, architecture, model.config, tuple(original.notes))


def _describe(original: Original, heads: int | None, pooling: str | None) -> tuple[str, LionConfig]:
    """Class name and configuration of the model in a checkpoint."""
    modality, mask_type = original.modality, _family(original)
    kinds = [
        kind
        for prefix, kind in HEADS[modality].items()
        if any(name.startswith(prefix) for name in original.tensors)
    ]
    architecture, labels = kinds[0] if kinds else ("LionModel", None)
    sizes = (_text_fields if modality == "text" else _image_fields)(original, mask_type, pooling)
    fields = {
        "modality": modality,
        "mask_type": mask_type,
        "num_hidden_layers": original.num_layers,
        "num_attention_heads": _num_heads(original, sizes["hidden_size"], heads),
        **sizes,
        **({} if labels is None else _label_fields(original, original.shape(labels, 2)[0])),
    }
    try:
        return architecture, LionConfig(**fields)
    except Exception as error:  # the strict configuration raises classes of its own
        raise ConversionError(
            f"the checkpoint's sizes and settings do not fit together: {error}"
        ) from error


def _family_mark(original: Original) -> str | None:
    return next(
        (mark for mark in FAMILY_MARKS[original.modality] if mark in original.in_layers), None
    )


def _family(original: Original) -> str:
    mark, setting = _family_mark(original), FAMILY_SETTING[original.modality]
    family = "lit" if mark is None else FAMILY_MARKS[original.modality][mark]
    stored = original.setting(setting, str)
    if stored is not None and stored.lower() not in FAMILY_WORDS[family]:
        raise ConversionError(
            f"the tensors are those of mask_type={family!r}, but the stored {setting} is {stored!r}"
        )
    if stored is None and family == "lit" and original.modality == "image":
        original.notes.append(
            "no gates and no stored family: read as LION-lit. A softmax ViT has the same names."
        )
    return family


def _num_heads(original: Original, hidden_size: int, asked: int | None) -> int:
    mark = _family_mark(original)
    if mark is not None:
        heads = original.in_layers[mark].shape[:1].numel()
        if asked not in (None, heads):
            raise ConversionError(
                f"--num-attention-heads (num_attention_heads) {asked}: the gates are those of"
                f" {heads} heads"
            )
        return heads
    if asked is not None:
        return asked
    stored = original.setting("num_attention_heads", int) or original.setting("num_heads", int)
    if stored:
        return stored
    if hidden_size % HEAD_DIM == 0 and hidden_size > HEAD_DIM:
        heads = hidden_size // HEAD_DIM
        original.notes.append(
            f"{heads} heads were assumed, {HEAD_DIM} wide as in the published models; see"
            " --num-attention-heads."
        )
        return heads
    raise ConversionError(
        "the checkpoint does not tell the number of attention heads: give --num-attention-heads N"
        " (num_attention_heads=N),"
        f" a divisor of the width, {hidden_size}"
    )


def _text_fields(original: Original, mask_type: str, pooling: str | None) -> dict[str, Any]:
    if pooling is not None:
        raise ConversionError(
            "--classifier-pooling (classifier_pooling) is for image checkpoints; text reads the"
            " first token"
        )
    words, hidden_size = original.shape("bert.embeddings.word_embeddings.weight", 2)
    fields = {name: original.setting(name, kind) for name, kind in STORED_TEXT_SETTINGS.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    positions = "bert.embeddings.position_embeddings.weight"
    if positions in original.tensors or mask_type == "lit":
        fields["max_position_embeddings"] = original.shape(positions, 2)[0]
    decoder = original.tensors.get("cls.predictions.decoder.weight")
    if decoder is not None and decoder.shape == (words, hidden_size):
        same = decoder == original.tensors["bert.embeddings.word_embeddings.weight"]
        fields["tie_word_embeddings"] = bool(same.all())
    return fields | {
        "vocab_size": words,
        "hidden_size": hidden_size,
        "intermediate_size": original.shape(
            f"{TEXT_LAYER.format(n=0)}.intermediate.dense.weight", 2
        )[0],
        "type_vocab_size": original.shape("bert.embeddings.token_type_embeddings.weight", 2)[0],
    }


def _image_fields(original: Original, mask_type: str, pooling: str | None) -> dict[str, Any]:
    hidden_size, channels, patch_size, _ = original.shape("patch_embed.proj.weight", 4)
    image_size = original.setting("input_size", int) or 224
    if "pos_embed" in original.tensors:
        tokens = original.shape("pos_embed", 3)[1]
        side = round((tokens - 1) ** 0.5)
        if side**2 != tokens - 1:
            raise ConversionError(
                f"pos_embed has {tokens} positions: expected those of a class token and a square"
                " of patches"
            )
        image_size = side * patch_size
    snake = any(name.startswith("attn.a2_i") for name in original.in_layers)
    if mask_type == "lit":  # no gates tell, and every order gives the same
        snake = original.setting("order", str) == "S"
    cls_tok = original.setting("cls_tok", bool)
    if pooling is None and cls_tok is None:
        raise ConversionError(
            "the checkpoint does not tell how its classifier pools: give --classifier-pooling cls"
            " (trained with --cls_tok) or"
            " mean (classifier_pooling in Python)"
        )
    if pooling not in (None, *CLASSIFIER_POOLINGS):
        raise ConversionError(
            f"classifier_pooling={pooling!r}: expected one of {CLASSIFIER_POOLINGS}"
        )
    return {
        "hidden_size": hidden_size,
        "intermediate_size": original.shape(f"{IMAGE_LAYER.format(n=0)}.mlp.fc1.weight", 2)[0],
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": image_size,
        "qkv_bias": "attn.qkv.bias" in original.in_layers,
        "use_position_embeddings": "pos_embed" in original.tensors,
        "patch_order": "snake" if snake else "raster",
        "classifier_pooling": pooling or ("cls" if cls_tok else "mean"),
    }


def _label_fields(original: Original, num_labels: int) -> dict[str, Any]:
    if num_labels > MOST_LABELS:
        raise ConversionError(
            f"the classifier has {num_labels} labels: expected at most {MOST_LABELS}"
        )
    stored = original.setting("id2label", dict) or {}
    names = {
        int(label): name
        for label, name in stored.items()
        if re.fullmatch("[0-9]{1,9}", str(label)) and isinstance(name, str)
    }
    if sorted(names) != list(range(num_labels)) or len(set(names.values())) != num_labels:
        return {"num_labels": num_labels}
    return {"id2label": names, "label2id": {name: label for label, name in names.items()}}


def _build(original: Original, architecture: str, config: LionConfig) -> LionPreTrainedModel:
    """The model with the checkpoint's weights, after a check of all names and shapes."""
    try:
        with torch.device("meta"):
            model = getattr(modeling_lion, architecture)(config)
    except Exception as error:  # sizes and settings may hold anything, and torch raises accordingly
        raise ConversionError(
            f"no model can be built from the checkpoint's sizes and settings: {error}"
        ) from error
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    prefix = "lion." if architecture == "LionModel" else ""
    rows = NAMES[config.modality] | GATES.get(
        (config.modality, config.mask_type, config.patch_order), {}
    )
    plan = {name: _source(prefix + name, rows) for name in expected}

    needed = {name for source in plan.values() for name in source.names}
    _check_names("lacks", needed - original.tensors.keys())
    _check_names("has unknown", original.tensors.keys() - needed - UNUSED)
    for name, source in plan.items():
        first, *rest = expected[name]
        shape = (first * 3 if source.third is not None else first // len(source.names), *rest)
        for wrong in (
            name for name in source.names if tuple(original.tensors[name].shape) != shape
        ):
            raise ConversionError(
                f"{wrong} has shape {tuple(original.tensors[wrong].shape)}: expected {shape}"
            )

    spoilt = not_finite((name, original.tensors[name]) for name in needed)
    if spoilt:
        raise ConversionError(
            f"the checkpoint holds NaN or infinity in {first_names(spoilt)}: its training diverged,"
            " or the file is damaged; convert an earlier one"
        )
    weights = {name: _take(source, original.tensors) for name, source in plan.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model


def _source(name: str, rows: Mapping[str, str | Source]) -> Source:
    """The original tensors that make up one of ours."""
    row, place = find_row(name, rows)
    source = row if isinstance(row, Source) else Source((row,))
    names = tuple(original.format(n=place.layer) + place.leaf for original in source.names)
    return Source(names, source.third)


def _take(source: Source, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tensor = torch.cat([tensors[name] for name in source.names])
    tensor = tensor if source.third is None else tensor.chunk(3)[source.third]
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _check_names(fault: str, names: set[str]) -> None:
    if names:
        raise ConversionError(
            f"the checkpoint {fault} tensors: {first_names(names)}. Is it an original LION"
            " checkpoint?"
        )


def _processor(original: Original, config: LionConfig, tokenizer: Any) -> Any:
    """The image processor or tokenizer to write beside the model, or None."""
    if original.modality == "image":
        if tokenizer is not None:
            raise ConversionError(
                "--tokenizer (tokenizer) is for text checkpoints; this one is of an image model"
            )
        crop = original.setting("eval_crop_ratio", float)
        return image_processor(config.image_size, crop if crop and 0 < crop <= 1 else 0.875)
    if tokenizer is None:
        original.notes.append(TOKENIZER_NOTE)
        return None
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = read_tokenizer(str(tokenizer), config)
    check_words(tokenizer, config)
    return tokenizer
