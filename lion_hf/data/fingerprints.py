"""Fingerprints of data files: cheap to take, and different once a file has been replaced."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST_ENTRIES = 32  # above this number of files, one digest stands for all
MOST_BYTES = 1 << 28  # that are read of many files
PIECES, PIECE = 16, 1 << 18  # samples per file, bytes per sample: 4 MiB are read at most


def fingerprint(paths: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """Describes files by name, size and samples of their content, to notice that one was replaced.

    Up to 4 MiB a file is read whole. Of a larger one 16 pieces are read, from its start to its
    end, so a change elsewhere that keeps the size is not seen.

    Args:
        paths: files, or folders, which stand for all files in them that are not hidden.

    Returns:
        For at most 32 files, {name: {"size": bytes, "hash": hexadecimal digits}}. Names are
        relative to the folder that all files share, so the whole folder may move. For more files,
        {"files": count, "size": bytes in all, "digest": ...} over all names and sizes and the
        content of as many files, evenly spread, as 256 MiB hold, of small files all; at least 32.

    Raises:
        OSError: if a file is missing or cannot be read.
    """
    files = sorted({file for path in paths for file in _files(Path(path))})
    if not files:
        return {}
    base = os.path.commonpath([file.parent for file in files])
    names = [Path(os.path.relpath(file, base)).as_posix() for file in files]
    sizes = [file.stat().st_size for file in files]
    if len(files) <= MOST_ENTRIES:
        return {
            name: {"size": size, "hash": _content_hash(file, size)}
            for name, file, size in zip(names, files, sizes)
        }
    digest = hashlib.sha256()
    for name, size in zip(names, sizes):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    read = sum(min(size, PIECES * PIECE) for size in sizes)
    samples = max(MOST_ENTRIES, min(len(files), len(files) * MOST_BYTES // max(read, 1)))
    for sample in range(samples):
        place = sample * (len(files) - 1) // (samples - 1)
        digest.update(_content_hash(files[place], sizes[place]).encode())
    return {"files": len(files), "size": sum(sizes), "digest": digest.hexdigest()[:16]}


def _files(path: Path) -> list[Path]:
    """The absolute paths of a file, or of all files below a folder that are not hidden."""
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        return [path]
    found = []
    for folder, subfolders, names in os.walk(path, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return found


def _content_hash(file: Path, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        if size <= PIECES * PIECE:
            digest.update(handle.read())
        else:
            for piece in range(PIECES):
                handle.seek(piece * (size - PIECE) // (PIECES - 1))
                digest.update(handle.read(PIECE))
    return digest.hexdigest()[:16]
