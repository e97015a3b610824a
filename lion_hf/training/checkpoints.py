"""Checkpoints that are whole or not there: a manifest of sizes and checksums, written last, seals each."""

import json
import logging
import os
import shutil
import zlib
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RESUME = ("auto", "never")  # or a checkpoint's folder


def seal(folder: str | os.PathLike) -> None:
    """Declares a checkpoint whole: writes size and CRC-32 of every file to its manifest, after they have reached the disk."""
    folder = Path(folder)
    files = {
        str(file.relative_to(folder)): _size_and_checksum(file, sync=True)
        for file in _files(folder)
    }
    partial = folder / f".{MANIFEST}"
    with partial.open("w", encoding="utf-8") as handle:
        json.dump(files, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, folder / MANIFEST)


def damage(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, or None if it is as it was sealed."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = [(name, int(size), int(checksum)) for name, (size, checksum) in manifest.items()]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so the run ended while it was written"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, size, checksum in manifest:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes: expected {size}"
        if _size_and_checksum(file)[1] != checksum:
            return f"the content of {name} has changed since it was written"
    return None


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders checkpoint-N of a run, by N, whole or not."""
    numbers = {
        path: path.name.removeprefix("checkpoint-")
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir()
    }
    return sorted(
        (path for path, number in numbers.items() if number.isdigit()),
        key=lambda path: int(numbers[path]),
    )


def find_checkpoint(
    output_dir: str | os.PathLike, resume: str = "auto", alone: bool = True
) -> Path | None:
    """The checkpoint to continue from, None to start anew.

    Args:
        output_dir: the run's folder.
        resume: "auto" for the newest whole checkpoint in it, with a warning that names each newer, broken one; "never" to start
            anew; or a checkpoint's folder.
        alone: whether a named checkpoint must be the newest one of the run, to be continued.

    Raises:
        ValueError: if the named folder is no whole checkpoint, or there are later ones in `output_dir`; or for "never" if there
            are checkpoints, which would be overwritten.
    """
    found = checkpoints(output_dir)
    if resume == "never":
        if found:
            raise ValueError(
                f"resume='never', but {output_dir} holds {found[-1].name}: choose another output_dir, or remove it"
            )
        return None
    if resume != "auto":
        problem = damage(resume) if Path(resume).is_dir() else "there is no such folder"
        if problem:
            raise ValueError(
                f"resume={resume!r}: {problem}; expected 'auto', 'never' or a whole checkpoint's folder"
            )
        places = [folder.resolve() for folder in found]
        own = Path(resume).resolve()
        later = found[places.index(own) + 1 :] if own in places else found
        whole = [folder.name for folder in later if damage(folder) is None]
        if whole and alone:
            raise ValueError(
                f"resume={resume!r}, but {output_dir} holds {', '.join(whole)} of another continuation, which 'auto' would take"
                " the next time: remove them, choose another output_dir, or take 'auto'"
            )
        return Path(resume)
    for folder in reversed(found):
        problem = damage(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is broken and left alone: %s", folder, problem)
    return None


def remove(folder: Path) -> None:
    """Deletes a checkpoint so that, interrupted, it does not look whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def rotate(output_dir: str | os.PathLike, limit: int | None, keep: str | None = None) -> None:
    """Deletes the oldest checkpoints but `limit` whole ones (None: all stay), and never the one named by `keep`."""
    found = checkpoints(output_dir)
    sealed = [folder for folder in found if (folder / MANIFEST).is_file()]
    for folder in found[: found.index(sealed[-limit])] if limit and len(sealed) > limit else []:
        if keep is None or folder.resolve() != Path(keep).resolve():
            remove(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and file.name not in (MANIFEST, f".{MANIFEST}")
    )


def _size_and_checksum(file: Path, sync: bool = False) -> list[int]:
    size = checksum = 0
    with file.open(
        "r+b" if sync else "rb"
    ) as handle:  # only files open for writing can be synchronised everywhere
        if sync:
            os.fsync(handle.fileno())
        while piece := handle.read(1 << 22):
            checksum, size = zlib.crc32(piece, checksum), size + len(piece)
    return [size, checksum]
