"""Reads the files of the original LION code as data: nothing in them is executed, and what they claim is checked."""

import argparse
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError

LAYERS = {
    "text": "bert.encoder.layer.{n}",
    "image": "blocks.{n}",
}  # what the names of a layer's tensors begin with
WRAPPERS = (
    "module.",
    "model.",
    "_orig_mod.",
)  # put before every name by DistributedDataParallel, Composer, torch.compile
ZIP_MAGIC = b"PK\x03\x04"
MOST_TUPLE_ITEMS = 10_000_000
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Inert:
    """What takes the place of harmless objects beside the weights (paths, random states): accepts everything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


INERT_NAMES = (
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    ),
    *(
        f"{module}.multiarray.{name}"
        for module in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    ),
    "numpy.ndarray",
    "numpy.dtype",
    "datetime.timedelta",
)


@dataclass
class Original:
    """An original checkpoint.

    Args:
        modality: "text" or "image".
        tensors: the state dict, without the prefixes of wrappers.
        settings: what is stored beside it: the arguments of image training, the BERT configuration of text training.
        notes: what the user should know.
    """

    modality: str
    tensors: dict[str, torch.Tensor]
    settings: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        pattern = re.compile(
            re.escape(LAYERS[self.modality]).replace(r"\{n\}", r"(\d+)") + r"\.(.+)"
        )
        numbered = [match for name in self.tensors if (match := pattern.fullmatch(name))]
        self.num_layers = len({match[1] for match in numbered})
        self.in_layers = {
            match[2]: self.tensors[match[0]] for match in numbered
        }  # name inside a layer -> one layer's tensor

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there, with so many dimensions."""
        if name not in self.tensors:
            raise ConversionError(
                f"the checkpoint lacks tensor {name}. Is it an original LION checkpoint?"
            )
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims:
            raise ConversionError(f"{name} has shape {shape}: expected {dims} dimensions")
        return shape

    def setting(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A stored setting, or None if it is absent or of another type: these files may hold anything."""
        value = self.settings.get(name)
        return (
            value if isinstance(value, kind) and isinstance(value, bool) == (kind is bool) else None
        )


def read_checkpoint(path: str | os.PathLike, use_ema: bool = False) -> Original:
    """Reads an original checkpoint.

    Args:
        path: the file. Image training wrote `{"model": ..., "model_ema": ..., "args": ...}`, text training
            `{"state": {"model": ...}}`.
        use_ema: take `model_ema`, the moving average of an image model's weights.

    Raises:
        ConversionError: for a file that is damaged, unsafe, or of another format.
    """
    checkpoint = _load(Path(path))
    state = _dig(checkpoint, "state", "model")
    if isinstance(state, dict):
        if use_ema:
            raise ConversionError(
                "--use-ema (use_ema) is for image checkpoints: a text checkpoint holds one set of weights"
            )
        modality, notes = "text", []
        settings = _dig(
            checkpoint, "state", "integrations", "huggingface", "model", "config", "content"
        )
    else:
        source, notes = _choose_weights(path, checkpoint, use_ema)
        modality, state, settings = "image", checkpoint[source], checkpoint.get("args")
        settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    tensors = _unwrap(state)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    return Original(modality, tensors, settings if isinstance(settings, dict) else {}, notes)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ConversionError(
            f"{path}: {'this is a folder, expected a file' if path.is_dir() else 'no such file'}"
        )
    with path.open(
        "rb"
    ) as file:  # here, so that a file without read permission is not called damaged
        try:
            if (
                file.read(4) != ZIP_MAGIC
            ):  # torch.load would take such a file, with an archive behind, for one of its old kind
                raise zipfile.BadZipFile("the file does not begin with an archive")
            archive = zipfile.ZipFile(file)
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            size = sum(entry.file_size for entry in archive.infolist())
            larger = packed or size > path.stat().st_size  # such an archive is not even read
            broken = None if larger else archive.testzip()
        except Exception as error:
            raise ConversionError(
                f"{path} is truncated or no PyTorch checkpoint (a zip archive, as torch.save writes): copy or download it again"
            ) from error
        if larger:
            raise ConversionError(
                f"{path} is not as torch.save writes it: it would unpack to more than its own size"
            )
        if broken is not None:
            raise ConversionError(
                f"{path} is damaged ({broken} fails its checksum): copy or download it again"
            )
        for entry in archive.infolist():
            if (
                entry.filename.endswith("data.pkl")
                and _tuple_items(archive.read(entry)) > MOST_TUPLE_ITEMS
            ):
                raise ConversionError(
                    f"{path} is not as torch.save writes it: its tuples unfold without measure"
                )
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace, *((Inert, name) for name in INERT_NAMES)]
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise ConversionError(
                f"{path} holds {blocked[1]}, which is neither a tensor nor a plain setting, so it was not loaded. If you"
                " trust the file, load it yourself and save it again with its weights and arguments only."
            ) from error
        raise ConversionError(
            f"{path} is damaged or no PyTorch checkpoint ({type(error).__name__}): copy or download it again"
        ) from error


def _tuple_items(data: bytes) -> int:
    """Items of all tuples of a pickle, those that it names again counted again; 2^40 fit into 200 bytes.

    Tuples may be keys, and to hash one is to visit all of its items: the time that loading takes grows with this number.
    """
    stack, memo, total = (
        [],
        {},
        0,
    )  # items behind every object on the pickle's stack; None is a mark
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if argument is None else argument] = stack[-1]
                continue
            if code.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif code.name == "MARK":
                stack.append(None)
                continue
            else:
                taken, wanted = [], len(code.stack_before)
                if pickletools.markobject in code.stack_before:
                    while (item := stack.pop()) is not None:
                        taken.append(item)
                    wanted = code.stack_before.index(pickletools.markobject)
                taken += [stack.pop() for _ in range(wanted)]
                items = len(taken) + sum(taken) if code.stack_after == [pickletools.pytuple] else 0
                stack += [items] * len(code.stack_after)
            total += stack[-1] if stack else 0
            if total > MOST_TUPLE_ITEMS:
                break
    except (ValueError, LookupError, TypeError):  # torch's reader says what is wrong with it
        pass
    return total


def _dig(tree: Any, *keys: str) -> Any:
    """The value behind keys in nested dicts, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _choose_weights(
    path: str | os.PathLike, checkpoint: Any, use_ema: bool
) -> tuple[str, list[str]]:
    """Key of the weights to take from an image checkpoint, and a note where there was a choice."""
    found = [name for name in ("model", "model_ema") if isinstance(_dig(checkpoint, name), dict)]
    if not found:
        content = f"a {type(checkpoint).__name__}"
        if isinstance(checkpoint, dict):
            content = f"keys {sorted(str(key)[:80] for key in checkpoint)[:20]}"
        raise ConversionError(
            f"{path} holds {content}: an original LION checkpoint holds 'model' or 'model_ema' with an image model's weights,"
            " or 'state' with a text model's"
        )
    if use_ema and "model_ema" not in found:
        raise ConversionError(f"--use-ema (use_ema): {path} holds no 'model_ema'")
    if found == ["model_ema"]:
        return "model_ema", [] if use_ema else [
            "the weights are 'model_ema', the moving average: the file holds no others."
        ]
    if "model_ema" in found and not use_ema:
        return "model", [
            "the weights are 'model'; --use-ema takes 'model_ema', their moving average."
        ]
    return ("model_ema" if use_ema else "model"), []


def _unwrap(state: dict) -> dict[str, Any]:
    """Drops the prefixes of wrappers, which stand before every name."""
    state = {str(name): tensor for name, tensor in state.items()}
    while state and (
        prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in state)), None)
    ):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _check_tensor(name: str, tensor: Any) -> None:
    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"
    ):
        raise ConversionError(f"{name} is no dense tensor")
    if tensor.dtype not in DTYPES and not name.endswith("position_ids"):
        raise ConversionError(f"{name} has type {tensor.dtype}: expected one of {DTYPES}")
    stored = tensor.untyped_storage().nbytes()
    # Zero strides make a few bytes look like terabytes.
    if not 0 < tensor.numel() * tensor.element_size() <= stored:
        raise ConversionError(
            f"{name} claims shape {tuple(tensor.shape)}, but the file holds {stored} bytes for it"
        )
