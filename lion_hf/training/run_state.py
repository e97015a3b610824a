"""Runs that are skipped once they are finished: what each depends on is kept beside its result, and compared."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME, cached_file

from ..folders import write_json
from .settings import differences

STATE_FILE = "run.json"  # what a run depends on, and, once it is finished, its metrics


def begin(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Notes what a run depends on, before it starts."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder, STATE_FILE), {"settings": settings})


def finish(
    folder: str | os.PathLike, settings: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    """Notes the metrics of a run, as its last step."""
    write_json(Path(folder, STATE_FILE), {"settings": settings, "metrics": metrics})


def finished(
    folder: str | os.PathLike, settings: Mapping[str, Any], redo: bool = False
) -> dict[str, float] | None:
    """The metrics of a run; None if it is not finished.

    Args:
        folder: the run's.
        settings: what it depends on, as plain values.
        redo: whether to delete what is there.

    Raises:
        ValueError: if the run was made, or begun, with other settings; it names them.
    """
    file = Path(folder, STATE_FILE)
    if redo:
        shutil.rmtree(folder, ignore_errors=True)
    if not file.is_file():
        return None
    state = json.loads(file.read_text(encoding="utf-8"))
    changes = "; ".join(differences(state["settings"], json.loads(json.dumps(settings))).values())
    if changes:
        raise ValueError(
            f"{folder} was made with other settings ({changes}): choose another output_dir, or redo"
        )
    return state.get("metrics")


def on_first_process(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """What the function returns on process 0, or the ValueError that it raises there, on all processes."""
    answer: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            answer[0] = function()
        except ValueError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_digest(path: str, weights: bool = True) -> str:
    """A hash of a folder's configuration and weights, or the name and commit of a model on the Hub."""
    if not Path(path).is_dir():
        file = cached_file(path, CONFIG_NAME)  # .../snapshots/COMMIT/config.json
        return f"{path}@{Path(file).parent.name}"
    found = hashlib.sha256()
    for file in sorted(
        file for file in Path(path).iterdir() if weights and file.suffix in (".safetensors", ".bin")
    ):
        with file.open("rb") as handle:
            while piece := handle.read(1 << 22):
                found.update(piece)
    return digest(
        [found.hexdigest(), json.loads(Path(path, "config.json").read_text(encoding="utf-8"))]
    )
