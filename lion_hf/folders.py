"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import glob
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# In a hidden folder, with the host's name; its writer holds the file's lock while it lives.
WRITER = ".writer"

# In messages of errors of no class of their own, which say that a file could not be written.
WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error", "(os error ")


def cannot_write(error: BaseException) -> bool:
    """Whether an error means that a file could not be written.

    Python has OSError for that, and safetensors its own error. torch.save raises RuntimeError and
    tokenizers a bare Exception, which only their texts tell from others.
    """
    if isinstance(error, OSError | SafetensorError):
        return True
    return isinstance(error, Exception) and any(word in str(error) for word in WRITE_ERRORS)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A file to write, whole or not at all; what was there before stays until then."""
    partial = path.with_name(f".{path.name}")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text to a file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes plain values to a file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def existing_part(path: Path) -> Path:
    """The path, or what there is of it."""
    return next((place for place in (path, *path.parents) if place.exists()), path)


def may_be_written_to(folder: Path) -> bool:
    """Whether this user may make files in a folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def check_new_folder(output: str | os.PathLike) -> Path:
    """The absolute path of a folder to write, which does not exist yet or is empty.

    Raises:
        ValueError: if something is there, or nothing can be written there.
    """
    output = Path(output).resolve()
    try:
        os.lstat(output.with_name(f".{output.name}.{'x' * 8}"))  # as `new_folder` will call it
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{output}: the name is too long; choose a shorter one") from error
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder: choose another output")
    place = existing_part(output.parent)
    if not place.is_dir() or not may_be_written_to(place):
        reason = "may not be written to" if place.is_dir() else "is no folder"
        raise ValueError(
            f"{output} cannot be made, because {place} {reason}: choose another output"
        )
    return output


@contextlib.contextmanager
def new_folder(output: str | os.PathLike) -> Iterator[Path]:
    """Writes a folder that appears under its name only if all went well.

    Yields:
        The path to write to, which does not exist yet. Its parent is hidden, beside the output, and
        belongs to this writer alone: what is left there is deleted at the end, and everything
        after an error or an interruption. What a killed writer left, the next one deletes.

    Raises:
        ValueError: as `check_new_folder`, which a caller with long work to do should call before.
        OSError: if it cannot be written, whatever the library that writes raises.
    """
    output = check_new_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(output)
    with (
        tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary,
        _marked(Path(temporary)),
    ):
        folder = Path(temporary) / output.name
        try:
            yield folder
        except Exception as error:
            if isinstance(error, OSError) or not cannot_write(error):
                raise
            raise OSError(f"{output} could not be written: {error}") from error
        if output.exists():
            output.rmdir()  # Windows renames onto nothing
        folder.rename(output)


@contextlib.contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """Holds a lock in a hidden folder, which the operating system drops when the process ends."""
    if fcntl is None:
        yield
        return
    with (folder / f"{WRITER}.new").open("wb", buffering=0) as mark:
        mark.write(socket.gethostname().encode())
        with contextlib.suppress(OSError):  # a filesystem without locks: nothing is ever deleted
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / f"{WRITER}.new").rename(folder / WRITER)
        yield


def _delete_leftovers(output: Path) -> None:
    """Deletes the hidden folders of writers of this output that were killed on this host.

    Another host's locks may not be seen here.
    """
    if fcntl is None:
        return
    random = "[a-z0-9_]" * 8  # of `tempfile`
    for path in output.parent.glob(f".{glob.escape(output.name)}.{random}/{WRITER}"):
        with contextlib.suppress(OSError), path.open("r+b") as mark:
            if mark.read() != socket.gethostname().encode():
                continue
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error if its writer lives
            if (path.parent / output.name).exists():
                shutil.rmtree(path.parent / output.name)  # before the mark, in case of an error
            shutil.rmtree(path.parent)


def has_weights(model: str | os.PathLike) -> bool:
    """Whether a folder holds weights; a name on the Hub is taken to."""
    return not Path(model).is_dir() or any(
        file for kind in ("*.safetensors", "pytorch_model*.bin") for file in Path(model).glob(kind)
    )
