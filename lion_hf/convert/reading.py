"""Reads the files of the original LION code as data, and checks what they claim."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from .errors import ConversionError
from .pickles import Namespace, StoredTensor
from .torch_files import open_torch_file

# What the names of a layer's tensors begin with.
LAYERS = {"text": "bert.encoder.layer.{n}", "image": "blocks.{n}"}
# Put before every name by DistributedDataParallel, Composer, torch.compile.
WRAPPERS = ("module.", "model.", "_orig_mod.")
MOST_WRAPPERS = 8
MOST_TENSORS = 20_000  # LION-large has 400
MOST_LAYERS = 512
MOST_NAME = 500
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Original:
    """An original checkpoint.

    Args:
        modality: "text" or "image".
        tensors: the state dict, without the prefixes of wrappers.
        settings: what is stored beside it: the arguments of image training, the BERT configuration
            of text training.
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
        if self.num_layers > MOST_LAYERS:
            raise ConversionError(
                f"the checkpoint has {self.num_layers} layers: expected at most {MOST_LAYERS}"
            )
        # name inside a layer -> one layer's tensor
        self.in_layers = {match[2]: self.tensors[match[0]] for match in numbered}

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there and have this number of dimensions."""
        if name not in self.tensors:
            raise ConversionError(
                f"the checkpoint lacks tensor {name}. Is it an original LION checkpoint?"
            )
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims:
            raise ConversionError(f"{name} has shape {shape}: expected {dims} dimensions")
        return shape

    def setting(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A stored setting, or None if it is absent or of another type."""
        value = self.settings.get(name)
        return (
            value if isinstance(value, kind) and isinstance(value, bool) == (kind is bool) else None
        )


def read_checkpoint(path: str | os.PathLike, use_ema: bool = False) -> Original:
    """Reads an original checkpoint.

    Args:
        path: the file. Image training wrote `{"model": ..., "model_ema": ..., "args": ...}`, text
            training `{"state": {"model": ...}}`.
        use_ema: take `model_ema`, the moving average of an image model's weights.

    Raises:
        ConversionError: for a file that is damaged, unsafe, or of another format.
    """
    with open_torch_file(path) as file:
        state, settings, modality, notes = _parts(path, file.content, use_ema)
        stored = _unwrap(state)
        _check_tensors(stored)
        tensors = file.tensors(stored)
    return Original(modality, tensors, settings if isinstance(settings, dict) else {}, notes)


def _parts(
    path: str | os.PathLike, checkpoint: Any, use_ema: bool
) -> tuple[dict, Any, str, list[str]]:
    """Weights, settings, modality and notes."""
    state = _dig(checkpoint, "state", "model")
    if isinstance(state, dict):
        if use_ema:
            raise ConversionError(
                "--use-ema (use_ema) is for image checkpoints: a text checkpoint holds one set of"
                " weights"
            )
        keys = ("state", "integrations", "huggingface", "model", "config", "content")
        return state, _dig(checkpoint, *keys), "text", []
    source, notes = _choose_weights(path, checkpoint, use_ema)
    settings = checkpoint.get("args")
    settings = settings.settings if isinstance(settings, Namespace) else settings
    return checkpoint[source], settings, "image", notes


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
            content = f"keys {sorted(str(key)[:80] for key in islice(checkpoint, 20))}"
        raise ConversionError(
            f"{path} holds {content}: an original LION checkpoint holds 'model' or 'model_ema'"
            " with an image model's weights,"
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
    for _ in range(MOST_WRAPPERS):
        prefix = next((p for p in WRAPPERS if all(name.startswith(p) for name in state)), None)
        if prefix is None or not state:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _check_tensors(tensors: Mapping[str, Any]) -> None:
    """Raises ConversionError unless these can be the tensors of a model."""
    if len(tensors) > MOST_TENSORS:
        raise ConversionError(
            f"the checkpoint has {len(tensors)} tensors: expected at most {MOST_TENSORS}"
        )
    for name, tensor in tensors.items():
        if len(name) > MOST_NAME or not name.isprintable():
            raise ConversionError(
                f"the checkpoint has a tensor of an impossible name: {name[:80]!r}"
            )
        if not isinstance(tensor, StoredTensor):
            raise ConversionError(f"{name} is not a dense tensor")
        if not tensor.nbytes:
            raise ConversionError(f"{name} claims shape {tensor.shape}: expected numbers in it")
        if tensor.dtype not in DTYPES and not name.endswith("position_ids"):
            raise ConversionError(f"{name} has type {tensor.dtype}: expected one of {DTYPES}")
