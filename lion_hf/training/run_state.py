"""Finished runs are skipped: what a run depends on is kept beside its result, and compared."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME, cached_file

from ..folders import write_json
from .checkpoints import checkpoints, remove
from .lock import folder_lock
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
        redo: whether to delete the result and the checkpoints.

    Raises:
        ValueError: if the run was made, or begun, with other settings, which it names; if its file
            cannot be read; or with `redo`, if the run is still going on.
    """
    file = Path(folder, STATE_FILE)
    if not file.is_file():
        return None
    if redo:
        with folder_lock(folder):
            for checkpoint in checkpoints(folder):
                remove(checkpoint)
            file.unlink()
        return None
    before, metrics = _read(file)
    changes = "; ".join(differences(before, json.loads(json.dumps(settings))).values())
    if changes:
        raise ValueError(
            f"{folder} was made with other settings ({changes}): choose another output_dir, or redo"
        )
    return metrics


def _read(file: Path) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Settings and metrics of a run.

    Raises:
        ValueError: if the file is not one that `begin` or `finish` has written.
    """
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        settings, metrics = state["settings"], state.get("metrics")
        if not isinstance(settings, dict) or not isinstance(metrics, dict | None):
            raise TypeError("it does not hold settings and metrics")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {error}): remove it to run again from"
            " the last checkpoint, or choose another output_dir, or redo"
        ) from error
    return settings, metrics


def on_first_process(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """Calls a function on the first process; all return its value or raise its ValueError."""
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
    """A hash of a folder's configuration and weights, or name and commit of a model on the Hub."""
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
