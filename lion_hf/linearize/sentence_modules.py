"""Keeps what sentence-transformers has beside a model: poolings, norms, prompts, lengths."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..convert.errors import ConversionError
from .settings import SHORTEST_WINDOW
from .sources import MOST_JSON_BYTES, read_json, read_weights

MODULES_FILE = "modules.json"
PIPELINE_FILE = "config_sentence_transformers.json"
# The first is today's, the others are those of old versions.
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

TOKENIZER_FILE = "tokenizer_config.json"
PIPELINES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
TRANSFORMERS = ("Transformer", "MLMTransformer")

# Modules that read nothing but what the transformer before them gives, so that they are the same
# behind LION.
KEPT_MODULES = (
    "Pooling",
    "Dense",
    "Normalize",
    "LayerNorm",
    "Dropout",
    "WordWeights",
    "WeightedLayerPooling",
    "CNN",
    "SpladePooling",
    "SparseAutoEncoder",
)
# Fields of the transformer's settings with what its model is built with, old and new.
MODEL_OPTIONS = ("model_args", "model_kwargs")
# Version control and the Hub lose these with their empty folder.
WITHOUT_FILES = ("Normalize", "Dropout")


@dataclass(frozen=True)
class SentenceModules:
    """The parts of a sentence-transformers folder.

    Args:
        folder: the folder.
        transformer: the folder inside it that holds the transformer, "" for itself.
        modules: the entries of modules.json, or none if there is no such file.
    """

    folder: Path
    transformer: str = ""
    modules: list[dict[str, Any]] = field(default_factory=list)

    @property
    def transformer_folder(self) -> Path:
        return self.folder / self.transformer

    @property
    def window(self) -> int | None:
        """Tokens that the source reads at once, if the folder says so.

        Recent versions of sentence-transformers say it in the tokenizer's settings alone.
        """
        tokenizer = self.transformer_folder / TOKENIZER_FILE
        places = (self._transformer_file(), "max_seq_length"), (tokenizer, "model_max_length")
        for file, name in places:
            settings = read_json(file) if file is not None and file.is_file() else {}
            window = settings.get(name) if isinstance(settings, dict) else None
            if isinstance(window, int) and window >= SHORTEST_WINDOW:
                return window
        return None

    def _transformer_file(self) -> Path | None:
        files = (self.transformer_folder / name for name in TRANSFORMER_FILES)
        return next((file for file in files if file.is_file()), None)

    def copy_to(self, output: Path, longest: int | None = None) -> None:
        """Writes them beside a LION model, which takes the transformer's place in the root.

        Args:
            output: the model's folder.
            longest: tokens of the longest text in place of the folder's own number.
        """
        if (self.folder / PIPELINE_FILE).is_file():
            shutil.copyfile(self.folder / PIPELINE_FILE, output / PIPELINE_FILE)
        found = self._transformer_file()
        if found is not None:
            settings_now = read_json(found)
            for name in MODEL_OPTIONS:
                if isinstance(settings_now.get(name), dict):  # of softmax attention
                    settings_now[name].pop("attn_implementation", None)
            if longest is not None:
                settings_now["max_seq_length"] = longest
            text = json.dumps(settings_now, indent=2) + "\n"
            (output / TRANSFORMER_FILES[0]).write_text(text, encoding="utf-8")
        if not self.modules:
            return
        first, *rest = self.modules
        entries = [first | {"path": ""}, *rest]
        (output / MODULES_FILE).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        for entry in rest:
            _copy_module(self.folder / entry["path"], output / entry["path"])


def find_sentence_modules(folder: Path) -> SentenceModules:
    """The parts of a folder, after a check that all can be kept. A plain model has none.

    Raises:
        ConversionError: for a module, a kind of pipeline or a file that cannot be kept.
    """
    if (folder / PIPELINE_FILE).is_file():
        _check_pipeline(folder / PIPELINE_FILE)
    if not (folder / MODULES_FILE).is_file():
        found = SentenceModules(folder)
    else:
        modules = _checked_modules(folder)
        found = SentenceModules(folder, modules[0]["path"], modules)
    for name in TRANSFORMER_FILES:
        file = found.transformer_folder / name
        if file.is_file() and not isinstance(read_json(file), dict):
            raise ConversionError(f"{file}: expected an object")
    return found


def _check_pipeline(file: Path) -> None:
    settings = read_json(file)
    kind = settings.get("model_type", PIPELINES[0]) if isinstance(settings, dict) else settings
    if kind not in PIPELINES:
        raise ConversionError(f"{file}: model_type={kind!r}: expected one of {PIPELINES}")


def _checked_modules(folder: Path) -> list[dict[str, Any]]:
    file = folder / MODULES_FILE
    modules = read_json(file)
    if not isinstance(modules, list) or not modules or not all(_is_entry(x) for x in modules):
        raise ConversionError(f"{file}: expected a list of modules, each with name, path and type")
    for number, entry in enumerate(modules):
        name = entry["type"].rpartition(".")[2]
        legal = KEPT_MODULES if number else TRANSFORMERS
        if not entry["type"].startswith("sentence_transformers.") or name not in legal:
            raise ConversionError(
                f"{file}: module {number} is {entry['type']!r}: expected one of {legal}, which"
                " LION can keep"
            )
        if not re.fullmatch(r"(\w[\w.-]*)?", entry["path"]) or bool(number) > bool(entry["path"]):
            raise ConversionError(f"{file}: path={entry['path']!r}: expected a folder beside it")
        if number:
            _check_module(folder / entry["path"], name)
    paths = [entry["path"] for entry in modules]
    if len({*paths}) < len(paths):
        raise ConversionError(f"{file}: two modules have one path: {paths}")
    return modules


def _is_entry(entry: Any) -> bool:
    names = ("name", "path", "type")
    return isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in names)


def _check_module(folder: Path, name: str) -> None:
    """Raises ConversionError if a module's files cannot be read."""
    settings = sorted(folder.glob("*.json"))
    if not settings and name not in WITHOUT_FILES:
        raise ConversionError(f"{folder} has no configuration of {name}")
    for file in settings:
        read_json(file, MOST_JSON_BYTES)
    _weights(folder)


def _weights(folder: Path) -> list[Path]:
    """The file of a module's weights, if it has any, after the check that it can be read."""
    names = ("model.safetensors", "pytorch_model.bin")
    files = [folder / name for name in names if (folder / name).is_file()][:1]
    read_weights(files)
    return files


def _copy_module(folder: Path, output: Path) -> None:
    output.mkdir()
    if not folder.is_dir():
        return
    for file in sorted(folder.glob("*.json")):
        shutil.copyfile(file, output / file.name)
    for file in _weights(folder):  # a pickle becomes safetensors
        tensors = {name: x.contiguous().clone() for name, x in read_weights([file]).items()}
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
