"""Unpacking archives with every Python that this package supports."""

import tarfile
from collections.abc import Iterable
from pathlib import Path


def unpack(
    archive: tarfile.TarFile, folder: Path, members: Iterable[tarfile.TarInfo] | None = None
) -> None:
    """Unpacks an archive, safely where Python can: before 3.10.12 and 3.11.4 it could not."""
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    archive.extractall(folder, members, **safely)  # type: ignore[arg-type]
