"""The files of a source: found, and measured, before anything is built from them."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..convert.errors import ConversionError, first_names
from ..convert.pickles import StoredTensor
from ..convert.reading import MOST_LAYERS, MOST_TENSORS
from ..convert.tokenizer_files import MEBIBYTE, MOST_SETTINGS_BYTES, check_size
from ..convert.torch_files import open_torch_file
from ..training.finite import not_finite

MOST_JSON_BYTES = 16 * MEBIBYTE  # 100,000 names of labels fit
MOST_HEADER_BYTES = 4 * MEBIBYTE  # of a safetensors file: about 40,000 tensors
MOST_SHARDS = 1000
MOST_LABELS = 100_000
MOST_ENLARGEMENT = 4  # of an image before its crop
SPARE_PARAMETERS = 16_000_000  # heads and poolers that a file may lack

# Files of a name on the Hub that are fetched before its weights are.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md", "*_*/*")
WEIGHT_FILES = {
    "model.safetensors": ("model.safetensors", "model-*.safetensors"),
    "pytorch_model.bin": ("pytorch_model.bin", "pytorch_model-*.bin"),
}

# Largest sizes in a configuration, by the names of all families. Above all published models, below
# what exhausts memory.
MOST = {
    **dict.fromkeys(
        ("hidden_size", "dim", "embedding_size", "num_attention_heads", "n_heads"), 2**16
    ),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "mlp_ratio"), 2**20),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), MOST_LAYERS),
    **dict.fromkeys(("max_position_embeddings", "vocab_size", "type_vocab_size"), 2**27),
    **dict.fromkeys(("image_size", "num_channels"), 2**16),
    **dict.fromkeys(("patch_size", "encoder_stride"), 2**12),
    **dict.fromkeys(("num_labels",), MOST_LABELS),
}


def source_folder(source: str | os.PathLike) -> Path:
    """The folder of a source, fetched from the Hub if it is a name; without its weights.

    Raises:
        ConversionError: for a name that is not a folder and cannot be fetched.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(SMALL_FILES)))
    except Exception as error:  # the Hub's client passes on the errors of its HTTP library
        raise ConversionError(
            f"source={str(source)!r} has no configuration that transformers can read: it is no"
            " folder, and the"
            f" Hub does not give it ({error})"
        ) from error


def read_json(file: Path, most: int = MOST_JSON_BYTES) -> Any:
    """The content of a file of bounded size.

    Raises:
        ConversionError: for a file that is larger, cannot be read or is not JSON.
    """
    check_size(file, most)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file} cannot be read as JSON: {error}") from error


def read_config(folder: Path, model_types: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration in a folder, after the check of all sizes in it.

    Args:
        folder: the folder.
        model_types: those that are allowed.

    Raises:
        ConversionError: if there is none, or it is not one of an allowed model of a size that
            exists.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConversionError(f"{folder} has no configuration (config.json)")
    content = read_json(file)
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}: expected an object")
    if content.get("model_type") not in tuple(model_types):
        raise ConversionError(
            f"model_type={content.get('model_type')!r}: expected one of {tuple(model_types)}"
        )
    for name, most in MOST.items():
        check_number(name, content.get(name), most)
    check_number("labels", len(content.get("id2label") or ()), MOST_LABELS)
    try:
        return CONFIG_MAPPING[content["model_type"]].from_dict(content)
    except Exception as error:  # the strict configurations raise classes of their own
        raise ConversionError(
            f"{file} has no configuration that transformers can read: {error}"
        ) from error


def check_number(name: str, value: Any, most: int) -> None:
    """Raises ConversionError if a number, or one of a list, is larger than any model's."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, int | float) and not abs(number) <= most:
            raise ConversionError(f"{name}={value!r}: expected at most {most}")


def weight_files(source: str | os.PathLike, folder: Path, subfolder: str = "") -> list[Path]:
    """The files with the weights, safetensors where there are any.

    Raises:
        ConversionError: if there are none, or an index names others than those of its folder.
    """
    for name, patterns in WEIGHT_FILES.items():
        if not Path(source).is_dir():
            revision = (folder.parent if subfolder else folder).name  # of the snapshot
            places = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
            snapshot_download(str(source), allow_patterns=places, revision=revision)
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index, patterns[1])
    raise ConversionError(f"{folder} has no weights: expected {' or '.join(WEIGHT_FILES)}")


def _shards(index: Path, pattern: str) -> list[Path]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConversionError(f"{index} has no weight_map of files")
    files = sorted(set(names.values()))
    legal = re.compile(re.escape(pattern).replace(r"\*", r"[\w.-]+"))
    for name in files:
        if not legal.fullmatch(name) or not (index.parent / name).is_file():
            raise ConversionError(
                f"{index} names {name[:80]!r}: expected files {pattern} beside it"
            )
    if len(files) > MOST_SHARDS:
        raise ConversionError(f"{index} names {len(files)} files: expected at most {MOST_SHARDS}")
    return [index.parent / name for name in files]


def check_parameters(config: PreTrainedConfig, model_class: Any, files: list[Path]) -> None:
    """Compares what a configuration asks for with what the files can hold.

    Nothing is allocated for it.

    Raises:
        ConversionError: if the model has more parameters than half of the files' bytes, and some to
            spare.
    """
    room = sum(file.stat().st_size for file in files) // 2
    try:
        with torch.device("meta"):
            needed = sum(parameter.numel() for parameter in model_class(config).parameters())
    except Exception as error:  # sizes may be anything, and torch raises accordingly
        raise ConversionError(
            f"no {model_class.__name__} can be built from config.json: {error}"
        ) from error
    if needed > room + SPARE_PARAMETERS:
        sizes = {name: config.to_dict()[name] for name in MOST if name in config.to_dict()}
        raise ConversionError(
            f"config.json describes a model of {needed:,} parameters, but {files[0].name} has room"
            f" for {room:,}: {sizes}"
        )


def read_weights(files: list[Path]) -> dict[str, torch.Tensor]:
    """The tensors in some files, safetensors or those of torch.save. No code in them is run.

    Raises:
        ConversionError: for a file that is damaged, or holds other things than tensors of finite
            numbers.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        read = _read_safetensors if file.suffix == ".safetensors" else _read_pickled
        found = read(file)
        if len(tensors) + len(found) > MOST_TENSORS:
            raise ConversionError(f"{file} has more than {MOST_TENSORS} tensors")
        spoilt = not_finite(found.items())
        if spoilt:
            raise ConversionError(f"{file} holds NaN or infinity in {first_names(spoilt)}")
        tensors |= found
    return tensors


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > MOST_HEADER_BYTES:
        raise ConversionError(
            f"{file} claims a header of {header} bytes: expected at most {MOST_HEADER_BYTES}"
        )
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises a class of its own
        raise ConversionError(f"{file} cannot be loaded: {error}") from error


def _read_pickled(file: Path) -> dict[str, torch.Tensor]:
    with open_torch_file(file) as opened:
        content = opened.content
        if not isinstance(content, dict) or len(content) > MOST_TENSORS:
            raise ConversionError(f"{file} cannot be loaded: it holds no dict of tensors")
        for name, value in content.items():
            if not isinstance(value, StoredTensor):
                raise ConversionError(
                    f"{file} cannot be loaded: {str(name)[:80]!r} is not a dense tensor"
                )
        return opened.tensors(content)


def check_image_sizes(folder: Path, config: PreTrainedConfig) -> None:
    """Raises ConversionError if an image processor makes images far larger than its model's."""
    file = folder / "preprocessor_config.json"
    content = read_json(file, MOST_SETTINGS_BYTES) if file.is_file() else {}
    side = getattr(config, "image_size", None)
    if not isinstance(content, dict) or side is None:
        return
    most = MOST_ENLARGEMENT * (max(side) if isinstance(side, list | tuple) else side)
    for name in ("size", "crop_size"):
        sides = content.get(name)
        check_number(name, list(sides.values()) if isinstance(sides, dict) else sides, most)


def license_of(folder: Path) -> str | None:
    """The licence that the model card in a folder names, or None."""
    file = folder / "README.md"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", errors="replace") as opened:
        head = opened.read(MEBIBYTE // 8)
    _, mark, rest = head.partition("---\n")
    found = (
        re.search(r"^license:[ \t]*[\"']?([\w.+-]+)", rest.partition("\n---")[0], re.M)
        if mark
        else None
    )
    return found[1] if found else None
