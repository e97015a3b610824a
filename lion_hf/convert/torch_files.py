"""Opens files that torch.save wrote, in its zip format or the older one, without torch.load."""

import contextlib
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from .archive import MAGIC, Archive
from .errors import ConversionError
from .pickles import MOST_BYTES, Broken, Storage, StoredTensor, Unpickler

OLD_MAGIC, OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # first two objects of the older format
SHARED_BYTES = 16 * 2**20


@dataclass
class TorchFile:
    """An open file: `content` is what was saved, with a `StoredTensor` for each tensor."""

    content: Any
    _read: Callable[[Storage], bytearray]

    def tensors(self, stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
        """Reads tensors, each with memory of its own unless it shares its storage.

        Raises:
            ConversionError: if they are damaged, or so many share storage that they are far more
                than the file holds.
        """
        storages = {tensor.storage.key: tensor.storage for tensor in stored.values()}
        sizes = [tensor.nbytes for tensor in stored.values()]
        held = sum(storage.nbytes for storage in storages.values())
        if sum(sizes) > held + max(sizes, default=0) + SHARED_BYTES:  # tied weights occur twice
            raise ConversionError(
                f"the tensors have {sum(sizes)} bytes, but the file holds {held} for them: too"
                " many share storage"
            )
        read = {key: self._storage(storage) for key, storage in storages.items()}
        return {
            name: torch.as_strided(
                read[tensor.storage.key], tensor.shape, tensor.stride, tensor.offset
            )
            for name, tensor in stored.items()
        }

    def _storage(self, storage: Storage) -> torch.Tensor:
        if not storage.numel:
            return torch.empty(0, dtype=storage.dtype)
        return torch.frombuffer(self._read(storage), dtype=storage.dtype, count=storage.numel)


@contextlib.contextmanager
def open_torch_file(path: str | os.PathLike) -> Iterator[TorchFile]:
    """Opens a file as torch.save writes it; its tensors can be read until the block ends.

    Raises:
        ConversionError: for a file that is missing, damaged or of another format, or holds other
            objects than tensors and plain settings.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(
            f"{path}: {'this is a folder, expected a file' if path.is_dir() else 'no such file'}"
        )
    with path.open("rb") as file:
        begins_as_archive = file.read(4) == MAGIC
        try:
            opened = (_open_archive if begins_as_archive else _open_old)(file, str(path))
        except Broken as error:
            raise ConversionError(
                f"{path} is damaged or no PyTorch checkpoint ({error}): copy or download it again"
            ) from error
        yield opened


def _open_archive(file: BufferedReader, name: str) -> TorchFile:
    archive = Archive(file, name)
    folders = [entry.split("/")[0] for entry in archive.entries if entry.endswith("/data.pkl")]
    if len(folders) != 1 or f"{folders[0]}/data.pkl" not in archive.entries:
        raise Broken(f"{len(folders)} entries named data.pkl")
    folder = folders[0]
    strange = next((entry for entry in archive.entries if not entry.startswith(f"{folder}/")), None)
    if strange is not None:
        raise Broken(f"an entry beside its folder, {strange[:80]!r}")
    if f"{folder}/byteorder" in archive.entries:
        order = bytes(archive.read(f"{folder}/byteorder", most=10)).decode("latin-1")
        if order != sys.byteorder:
            raise Broken(f"byte order {order!r}, expected {sys.byteorder!r}")
    unpickler = Unpickler(archive.read(f"{folder}/data.pkl", most=MOST_BYTES), name)
    content = unpickler.load()

    def read(storage: Storage) -> bytearray:
        entry = f"{folder}/data/{storage.key}"
        held = archive.entries[entry].size if entry in archive.entries else 0
        if held < storage.nbytes:
            raise ConversionError(
                f"{name} is damaged: a storage claims {storage.nbytes} bytes, but the file holds"
                f" {held} for it"
            )
        return archive.read(entry)

    return TorchFile(content, read)


def _open_old(file: BufferedReader, name: str) -> TorchFile:
    """The older format: five pickles, and the storages in the order of the last one's keys."""
    size = file.seek(0, 2)
    file.seek(0)
    unpickler = Unpickler(file.read(MOST_BYTES), name)
    try:
        known = unpickler.load() == OLD_MAGIC and unpickler.load() == OLD_PROTOCOL
    except (Broken, ConversionError):
        known = False
    if not known:
        raise ConversionError(
            f"{name} is truncated or no PyTorch checkpoint (a file as torch.save writes): copy or"
            " download it again"
        )
    system, content, keys = (unpickler.load() for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not (
        sys.byteorder == "little"
    ):
        raise Broken("another byte order")
    places, start = {}, unpickler.at
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Broken("no list of storages")
    for key in keys:
        places[key] = start + 8
        start += 8 + _old_size(file, start, unpickler.storages.get(key))
    if start != size:
        raise Broken("its storages end at another place than the file")

    def read(storage: Storage) -> bytearray:
        if storage.key not in places:
            raise ConversionError(f"{name} is damaged: it lacks storage {storage.key[:80]}")
        file.seek(places[storage.key])
        data = bytearray(storage.nbytes)
        file.readinto(data)
        return data

    return TorchFile(content, read)


def _old_size(file: BufferedReader, start: int, storage: Storage | None) -> int:
    """Bytes of a storage, whose number of elements is before it."""
    file.seek(start)
    count = file.read(8)
    if storage is None or len(count) < 8 or struct.unpack("<q", count)[0] != storage.numel:
        raise Broken("a storage of another size than its tensors say")
    return storage.nbytes
