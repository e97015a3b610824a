"""Which image model is trained: LION by preset, folder or name, a softmax ViT, or one of timm's."""

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ..data.image_settings import Augmentation
from ..folders import has_weights
from ..modeling.configuration_lion import LionConfig
from ..modeling.lion_embeddings import resize_images
from ..modeling.modeling_lion import LionForImageClassification
from ..presets import find_preset, preset_names
from ..training.settings import parse_mapping, parse_overrides
from .image_arguments import ImageTrainingArguments
from .image_settings import ModelSettings, TeachingSettings
from .loading import load_model, random_model

logger = logging.getLogger(__name__)

MIXING = ("mask_type", "order", "format", "chunk_size")
# Settings that other models of timm do not have.
LION_ONLY = (*MIXING, "pos_emb", "cls_tok", "softmax")
USUAL_SIZE = 224  # of models that take any


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Args:
        path: folder or Hub name of a transformers model; None for a model of timm.
        original_words: whether the original's name was given, such as lion_base_patch16_224.
        weights: whether there are weights to start from.
    """

    path: str | None
    original_words: bool = False
    weights: bool = False


def find_model(settings: ModelSettings) -> ModelSource:
    """Finds the model that the settings name.

    Raises:
        ValueError: if there is none, with the nearest name.
    """
    name = settings.model
    folder = Path(find_preset(name))
    if (folder / "config.json").is_file():
        return _transformers_source(str(folder), settings)
    if name.startswith("lion_") and timm.is_model(name):
        preset = find_preset(f"lion-s-{name.split('_')[1]}-patch16-224")
        return _transformers_source(preset, settings, original_words=True)
    if timm.is_model(name):
        return ModelSource(None)
    if "/" in name:
        return _transformers_source(name, settings)
    presets = [preset for preset in preset_names() if "-patch" in preset]
    legal = [*presets, *timm.list_models("lion_*")]
    nearest = difflib.get_close_matches(name, legal, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"model={name!r} is neither a folder with config.json nor a preset or model of timm;"
        f" did you mean {nearest}?"
    )


def check_native_resolution(
    settings: ModelSettings,
    augmentation: Augmentation,
    teaching: TeachingSettings,
    args: ImageTrainingArguments,
) -> None:
    """Checks that the settings of a run leave the images as they are, or that none asks for it.

    Raises:
        ValueError: for settings that need images of one size, a model that takes no others, or a
            batch that cannot hold an image.
    """
    budget, most = args.patches_per_batch, augmentation.max_patches
    if not augmentation.native_resolution:
        _check_one_size(settings.model, budget)
        return
    if budget is not None and most is not None and budget < most:
        raise ValueError(
            f"patches_per_batch={budget} with max_patches={most}: expected at least as many,"
            " because one image may have so many"
        )
    one_size = {
        "input_size": (settings.input_size, None),
        "softmax": (settings.softmax, False),
        "distillation_type": (teaching.distillation_type, "none"),
        "torch_compile": (args.torch_compile, False),
    }
    for name, (value, legal) in one_size.items():
        if value != legal:
            raise ValueError(
                f"{name}={value!r} with native_resolution: expected {legal!r}, because images keep"
                " their size and shape"
            )
    if args.n_gpu > 1:  # torch's DataParallel would split the row
        raise ValueError(
            f"native_resolution on {args.n_gpu} GPUs in one process: expected one process per GPU,"
            " as torchrun and accelerate launch start them"
        )
    if find_model(settings).path is None:
        raise ValueError(
            f"model={settings.model!r} with native_resolution: expected a LION model, which takes"
            " images of any size"
        )


def _check_one_size(folder: str, budget: int | None) -> None:
    """Checks a run without native resolution; says if its model was trained with it."""
    if budget is not None:
        raise ValueError(
            f"patches_per_batch={budget} without native_resolution: expected both, or none"
        )
    try:
        content = json.loads(Path(folder, "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(content, dict) and content.get("native_resolution"):
        logger.warning(
            "the image processor of %s has native_resolution; without --native_resolution, images"
            " are cropped to one size",
            folder,
        )


def class_order(settings: ModelSettings, names: Sequence[str], train: bool) -> list[str]:
    """The order of the classes: that of a model with weights if it knows the data's classes.

    Args:
        settings: name the model.
        names: the classes of the data.
        train: whether the model is trained. Without training, classes that only the model knows
            are kept.

    Returns:
        The names by class number.

    Raises:
        ValueError: if the model is not trained, and does not know a class of the data.
    """
    source = find_model(settings)
    if not source.weights or source.path is None or settings.softmax:
        return list(names)
    config = _read_config(settings, source.path)
    known = [config.id2label[number] for number in range(config.num_labels)]
    if set(known) == set(names) or (not train and set(names) <= set(known)):
        return known
    if not train and not _unnamed(known, names):
        missing = sorted(set(names) - set(known))
        raise ValueError(
            f"model={settings.model!r} does not know {len(missing)} classes of the data, such as"
            f" {missing[0]!r}: train it first (do_train=True), or name a model that knows them"
        )
    return list(names)


def build_model(
    settings: ModelSettings, names: Sequence[str], distillation_head: bool = False
) -> PreTrainedModel:
    """Builds the model of the settings, with its weights if it has some and they are wanted.

    Args:
        settings: name the model and fields of its configuration.
        names: the classes by number; see `class_order`.
        distillation_head: whether a second head learns from a teacher.

    Raises:
        ValueError: if there is no such model, it is not one for images, or it has no second head.
    """
    source, labels = find_model(settings), _labels(names)
    if distillation_head and (source.path is None or settings.softmax):
        given = "softmax=True" if settings.softmax else f"model={settings.model!r}"
        raise ValueError(
            f"distillation_token=True with {given}: expected False, because only LION's models have"
            " a head for it"
        )
    config = read_lion_config(settings, names, distillation_head)
    if source.path is None or config is None:
        return random_model(build_timm_model(settings, labels))
    if settings.softmax:
        _say_what_is_left_out(settings, config)
        return random_model(softmax_model(config, labels))
    if not source.weights:
        return random_model(AutoModelForImageClassification.from_config(config))
    return _with_weights(settings, source.path, config)


def read_lion_config(
    settings: ModelSettings, names: Sequence[str], distillation_head: bool = False
) -> LionConfig | None:
    """The configuration of the model that `build_model` builds; None for a model of timm.

    Args:
        settings, names, distillation_head: as in `build_model`.

    Raises:
        ValueError: as `build_model`.
    """
    source = find_model(settings)
    if source.path is None:
        return None
    before = _read_config(settings, source.path)
    if not isinstance(before, LionConfig) or before.modality != "image":
        raise ValueError(
            f"model={settings.model!r} is a {before.model_type}: expected a LION model for images"
        )
    fields = settings.overrides(source.original_words)
    fields |= parse_overrides(settings.model_overrides, before) | _labels(names)
    if distillation_head:
        fields["distillation_head"] = True
    if settings.input_size and not source.weights:
        fields["image_size"] = settings.input_size
    return LionConfig.from_pretrained(source.path, **fields)


def _labels(names: Sequence[str]) -> dict[str, Any]:
    """The classes as fields of a configuration."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {label: n for n, label in enumerate(names)},
    }


def _say_what_is_left_out(settings: ModelSettings, config: LionConfig) -> None:
    """Warns of options that a softmax ViT does not have, because the comparison is without them."""
    options = {name: getattr(settings, name) for name in MIXING}
    options["drop_path"] = config.drop_path_rate
    given = [f"{name}={value}" for name, value in options.items() if value]
    if given:
        logger.warning("softmax: transformers' ViT learns without %s", ", ".join(given))


def softmax_model(config: LionConfig, labels: dict[str, Any]) -> ViTForImageClassification:
    """A ViT of the size of a LION model, without weights."""
    same = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "layer_norm_eps",
        "initializer_range",
        "qkv_bias",
        "image_size",
        "patch_size",
        "num_channels",
    )
    fields = {name: getattr(config, name) for name in same}
    return ViTForImageClassification(ViTConfig(**fields, **labels))


def build_timm_model(
    settings: ModelSettings, labels: dict[str, Any]
) -> TimmWrapperForImageClassification:
    """Another model of timm, without weights; its overrides are timm's arguments.

    Raises:
        ValueError: for options of LION's models, or overrides or an image size that the model does
            not take.
    """
    for name in LION_ONLY:
        if (value := getattr(settings, name)) not in (None, False):
            raise ValueError(
                f"{name}={value!r} with model={settings.model!r}: expected none, because it is for"
                " LION's models; model_overrides takes timm's arguments"
            )
    arguments = parse_mapping(settings.model_overrides)
    if settings.drop_path:  # not all models have it; 0 is for those that do not
        arguments = {"drop_path_rate": settings.drop_path} | arguments
    if settings.input_size and timm.get_pretrained_cfg(settings.model).fixed_input_size:
        arguments = {"img_size": settings.input_size} | arguments
    try:
        config = TimmWrapperConfig(architecture=settings.model, model_args=arguments, **labels)
        return TimmWrapperForImageClassification(config)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"model={settings.model!r} does not take {arguments}: {error}") from error


def image_size_of(settings: ModelSettings, model: PreTrainedModel) -> Any:
    """Height and width in pixels, one integer or a pair: as the settings or the model have them."""
    if settings.input_size:
        return settings.input_size
    if not isinstance(model, TimmWrapperForImageClassification):
        return getattr(model.config, "image_size", USUAL_SIZE)
    usual = timm.get_pretrained_cfg(settings.model)
    fixed = usual.input_size[1:] if usual.fixed_input_size else USUAL_SIZE
    return (model.config.model_args or {}).get("img_size", fixed)


def _with_weights(
    settings: ModelSettings, path: str, config: LionConfig
) -> LionForImageClassification:
    """The model of a folder, with a new classifier if its classes are not those of the data."""
    before = _read_config(settings, path)
    known = [before.id2label[number] for number in range(before.num_labels)]
    names = [config.id2label[number] for number in range(config.num_labels)]
    keep = known == names or _unnamed(known, names)
    if not keep:
        logger.warning(
            "the classifier of %s knows other classes (%d, the first %r) than the data (%d, the"
            " first %r): a random one takes its place",
            settings.model,
            len(known),
            known[0],
            len(names),
            names[0],
        )
    options = {"config": config, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    model, info = load_model(AutoModelForImageClassification, path, **options)
    heads = () if keep else ("classifier.", "distiller.")
    for name, found, asked in sorted(info["mismatched_keys"]):
        if not name.startswith(heads):
            raise ValueError(
                f"model={settings.model!r}: {name} has shape {tuple(found)}, the settings ask for"
                f" {tuple(asked)}; from_scratch starts from random weights"
            )
    if not keep and len(known) == len(names):
        for head in filter(None, (model.classifier, getattr(model, "distiller", None))):
            torch.nn.init.normal_(head.weight, std=config.initializer_range)
            torch.nn.init.zeros_(head.bias)
    if settings.input_size:
        resize_images(model, settings.input_size)
    return model


def _unnamed(known: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a model has as many classes as the data, and no names of its own for them."""
    return list(known) == [f"LABEL_{n}" for n in range(len(names))]


def _read_config(settings: ModelSettings, path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={settings.model!r} cannot be loaded: {error}") from error


def _transformers_source(
    path: str, settings: ModelSettings, original_words: bool = False
) -> ModelSource:
    return ModelSource(path, original_words, has_weights(path) and not settings.from_scratch)
