"""Checkpoints that are whole or not there: a manifest of sizes and checksums, written last.

Only folders that a run has written are ever deleted: they hold a manifest, or the mark of one that
is being written. What else bears the name of a checkpoint stays.
"""

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path

from ..folders import whole_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNSEALED = ".unsealed"  # marks a checkpoint that is being written, or deleted
RESUME = ("auto", "never")  # or a checkpoint's folder


def begin(folder: str | os.PathLike) -> None:
    """Makes the folder of a new checkpoint, in place of an earlier try.

    What another program left under this name is not deleted but renamed.

    Raises:
        OSError: if the folder cannot be made.
    """
    folder = Path(folder)
    if is_own(folder):
        remove(folder)
    elif os.path.lexists(folder):
        aside = (folder.with_name(f"{folder.name}.other{n or ''}") for n in range(1000))
        place = next(path for path in aside if not os.path.lexists(path))
        folder.rename(place)
        logger.warning("%s is not a checkpoint of this run, and is now %s", folder, place.name)
    folder.mkdir(parents=True)
    (folder / UNSEALED).touch()


def seal(folder: str | os.PathLike) -> None:
    """Declares a checkpoint whole: writes size and CRC-32 of every file to its manifest.

    The manifest is written after all files have reached the disk.
    """
    folder = Path(folder)
    files = {
        str(file.relative_to(folder)): _size_and_checksum(file, sync=True)
        for file in _files(folder)
    }
    with whole_file(folder / MANIFEST) as handle:
        json.dump(files, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    (folder / UNSEALED).unlink(missing_ok=True)


def damage(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, or None if it is as it was sealed."""
    folder = Path(folder)
    try:
        manifest = _manifest(folder)
        for name, size, checksum in manifest:
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes: expected {size}"
            if _size_and_checksum(file)[1] != checksum:
                return f"the content of {name} has changed since it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so the run ended while it was written"
    except ValueError as error:
        return f"its {MANIFEST} cannot be read ({error})"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def is_own(folder: Path) -> bool:
    """Whether a run wrote this checkpoint: it has a manifest, or the mark of an unsealed one.

    A symbolic link was made by somebody else, whatever it points to.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    if (folder / UNSEALED).is_file():
        return True
    try:
        _manifest(folder)
    except (ValueError, OSError):
        return False
    return True


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders checkpoint-N of a run, by N, whole or not."""
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-([0-9]{1,18})", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(
    output_dir: str | os.PathLike, resume: str = "auto", alone: bool = True
) -> Path | None:
    """The checkpoint to continue from, None to start anew.

    Args:
        output_dir: the run's folder.
        resume: "auto" for the newest whole checkpoint in it, with a warning that names each newer,
            broken one; "never" to start anew; or a checkpoint's folder.
        alone: whether a named checkpoint must be the newest one of the run, to be continued.

    Raises:
        ValueError: if the named folder is not a whole checkpoint, or there are later ones in
            `output_dir`; or for "never" if there are checkpoints, which would be overwritten.
    """
    found = checkpoints(output_dir)
    if resume == "never":
        if found:
            raise ValueError(
                f"resume='never', but {output_dir} holds {found[-1].name}: choose another"
                " output_dir, or remove it"
            )
        return None
    if resume != "auto":
        _check_named(output_dir, resume, found, alone)
        return Path(resume)
    for folder in reversed(found):
        problem = damage(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is broken and left alone: %s", folder, problem)
    return None


def named_or_newest(
    output_dir: str | os.PathLike, resume: str | bool | None, warns: bool = False
) -> str | None:
    """The checkpoint that `resume_from_checkpoint` of Trainer means; None to start anew.

    Args:
        output_dir: the run's folder.
        resume: a checkpoint's folder, or True for the newest whole one.
        warns: whether to warn where a new run is written beside an old one.

    Raises:
        ValueError: for True where there is none.
    """
    if resume is True:
        newest = find_checkpoint(output_dir)
        if newest is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but {output_dir} holds no whole checkpoint"
            )
        return str(newest)
    if resume:
        return resume
    there = checkpoints(output_dir) if warns else []
    if whole := [path.name for path in there if (path / MANIFEST).is_file()]:
        logger.warning(
            "a new run is written to %s, which holds %s of an earlier one: choose another"
            " output_dir, or continue that run",
            output_dir,
            ", ".join(whole),
        )
    return None


def _check_named(
    output_dir: str | os.PathLike, resume: str, found: list[Path], alone: bool
) -> None:
    problem = damage(resume) if Path(resume).is_dir() else "there is no such folder"
    if problem:
        raise ValueError(
            f"resume={resume!r}: {problem}; expected 'auto', 'never' or a whole checkpoint's folder"
        )
    places = [folder.resolve() for folder in found]
    own = Path(resume).resolve()
    later = found[places.index(own) + 1 :] if own in places else found
    whole = [folder.name for folder in later if damage(folder) is None] if alone else []
    if whole:
        raise ValueError(
            f"resume={resume!r}, but {output_dir} holds {', '.join(whole)} of another continuation,"
            " which 'auto' would take the next time: remove them, choose another output_dir, or"
            " take 'auto'"
        )


def remove(folder: Path) -> bool:
    """Deletes a checkpoint so that, interrupted, it does not look whole; returns whether it did.

    A folder that no run has written stays.
    """
    if not is_own(folder):
        logger.warning("%s is not a checkpoint of a run, and stays", folder)
        return False
    if (folder / MANIFEST).is_file():
        os.replace(folder / MANIFEST, folder / UNSEALED)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != UNSEALED:  # last, so that the rest can still be told to be a run's
            entry.unlink()
    (folder / UNSEALED).unlink()
    folder.rmdir()
    return True


def rotate(newest: Path, limit: int | None, keep: str | None = None) -> None:
    """Deletes the oldest of a run's own checkpoints.

    Args:
        newest: the checkpoint that was just written. Whole ones with higher numbers beside it are
            older: they belong to an earlier run.
        limit: the number of whole checkpoints that stay; None for all.
        keep: a checkpoint that stays too.
    """
    own = [folder for folder in checkpoints(newest.parent) if is_own(folder)]
    whole = [folder for folder in own if (folder / MANIFEST).is_file()]
    behind = own.index(newest) + 1
    later = [folder for folder in own[behind:] if folder in whole]
    found = later + own[:behind]
    sealed = [folder for folder in found if folder in whole]
    for folder in found[: found.index(sealed[-limit])] if limit and len(sealed) > limit else []:
        if keep is None or folder.resolve() != Path(keep).resolve():
            remove(folder)


def _manifest(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and CRC-32 of every file that was sealed.

    Raises:
        FileNotFoundError: if there is no manifest.
        ValueError: if it cannot be understood.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    try:
        files = json.loads(text)
        return [(name, int(size), int(checksum)) for name, (size, checksum) in files.items()]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _files(folder: Path) -> list[Path]:
    others = (MANIFEST, f".{MANIFEST}", UNSEALED)
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in others)


def _size_and_checksum(file: Path, sync: bool = False) -> list[int]:
    size = checksum = 0
    mode = "r+b" if sync else "rb"  # only files open for writing can be synchronised everywhere
    with file.open(mode) as handle:
        if sync:
            os.fsync(handle.fileno())
        while piece := handle.read(1 << 22):
            checksum, size = zlib.crc32(piece, checksum), size + len(piece)
    return [size, checksum]
