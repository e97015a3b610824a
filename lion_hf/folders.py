"""Files and folders that appear whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def check_new_folder(output: str | os.PathLike) -> Path:
    """The absolute path of a folder to write, after the check that it does not exist or is empty; it is not made yet.

    Raises:
        ValueError: if something is there.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder: choose another output")
    return output


@contextlib.contextmanager
def new_folder(output: str | os.PathLike) -> Iterator[Path]:
    """Writes a folder that appears under its name only if all went well.

    Yields:
        The path to write to, which does not exist yet. Its parent is hidden, beside the output, and this writer's alone: what
        is left in there goes at the end, after an error or an interruption everything does.

    Raises:
        ValueError: as `check_new_folder`, which a caller with much to do first asks beforehand.
    """
    output = check_new_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        yield folder
        if output.exists():
            output.rmdir()  # Windows renames onto nothing
        folder.rename(output)


def has_weights(model: str | os.PathLike) -> bool:
    """Whether a folder holds weights; a name on the Hub is taken to."""
    return not Path(model).is_dir() or any(
        file for kind in ("*.safetensors", "pytorch_model*.bin") for file in Path(model).glob(kind)
    )
