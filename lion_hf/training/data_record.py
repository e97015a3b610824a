"""What a run trains on, kept beside its checkpoints, so that it never continues with other data."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..folders import write_json

logger = logging.getLogger(__name__)

DATA_FILE = "data.json"
MOST_CHANGES = 12  # differences that an error lists


def write_data(folder: str | os.PathLike, data: Mapping[str, Any]) -> None:
    """Writes `data.json`, the description of a run's data, when the run begins."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder, DATA_FILE), data)


def check_data(folder: str | os.PathLike, data: Mapping[str, Any]) -> None:
    """Compares the data of a run that continues with those that it began with.

    Args:
        folder: the run's.
        data: plain values that describe the data, as given to `write_data`.

    Raises:
        ValueError: if they differ, with both values of each entry, or if the file cannot be read.
    """
    file = Path(folder, DATA_FILE)
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        logger.warning(
            "%s has no %s, as runs of older versions: whether the data are the same is not checked",
            folder,
            DATA_FILE,
        )
        return
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}). Remove it if the data are those that the run began"
            " with, or choose another output_dir"
        ) from error
    changes = _changes("", before, json.loads(json.dumps(data)))
    if changes:
        more = len(changes) - MOST_CHANGES
        listed = "; ".join(changes[:MOST_CHANGES]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(
            f"the run in {folder} began with other data: {listed}. Bring back what it began with,"
            " or choose another output_dir to start anew"
        )


def _changes(name: str, before: Any, now: Any) -> list[str]:
    """Each entry that differs with both values; entries of mappings and lists on their own."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in {**before, **now}:
            inner = f"{name}[{key!r}]" if name else str(key)
            if key not in now:
                found.append(f"{inner} was {_short(before[key])} and is gone")
            elif key not in before:
                found.append(f"{inner} is new: {_short(now[key])}")
            else:
                found += _changes(inner, before[key], now[key])
        return found
    return [] if before == now else [f"{name} was {_short(before)} and is {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"
