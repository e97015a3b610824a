"""Where the hidden states of a long document stay: in memory, or in files that are mapped into it.

Mapped pages belong to the file. The system writes them out and drops them when it needs memory, so
they do not count as memory of the process. The files have the safetensors format, with one tensor,
`hidden_states`. In a cache folder there is also a record of how far the work has come, which is
replaced at once and never half written.
"""

import contextlib
import json
import logging
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .lion_borders import BorderState
from .lion_long_marks import alike

try:
    import fcntl
except ImportError:  # Windows: two runs in one cache are not noticed
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RECORD, LOCK = "record.safetensors", "lock"
# Hidden states of a document without a cache folder, that is both tensors together, stay in memory
# up to this many bytes, else in temporary files.
LARGEST_IN_MEMORY = 2**29
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Progress(NamedTuple):
    """How far a document has come.

    Fields:
        stage: what is being computed: 0 the embeddings, n the layer n, counted from 1.
        pieces: finished pieces of that stage.
        state: of the layer's left-to-right direction, behind the last finished piece.
    """

    stage: int = 0
    pieces: int = 0
    state: BorderState | None = None


class LongStates:
    """Two tensors of hidden states, (L, hidden): each layer reads one and writes the other.

    Args:
        shape: (L, hidden).
        dtype: of the hidden states.
        device: of tensors in memory.
        last_stage: number of layers.
        cache: the folder for the files and the record, or None.
        memory_if_full: without cache, whether the tensors stay in memory where temporary files have
            no room.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        last_stage: int,
        cache: "Cache | None",
        memory_if_full: bool = False,
    ):
        self.shape, self.dtype, self.device, self.cache = shape, dtype, device, cache
        self.last_stage = last_stage
        size = shape[0] * shape[1] * dtype.itemsize
        self.in_memory = cache is None and 2 * size <= LARGEST_IN_MEMORY
        self.tensors: dict[int, torch.Tensor] = {}
        self.maps: dict[int, mmap.mmap] = {}
        self.progress = Progress() if cache is None else cache.progress
        self.header = _header(shape, dtype)
        if cache is not None:
            self._check_files(cache)
        if not self.in_memory and not self.finished:
            self._reserve(memory_if_full and cache is None)

    @property
    def finished(self) -> bool:
        return self.progress.stage > self.last_stage

    def of_stage(self, stage: int) -> torch.Tensor:
        """The tensor that a stage writes, (L, hidden)."""
        slot = stage % 2
        if slot not in self.tensors:
            if self.in_memory:
                self.tensors[slot] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            else:
                self.tensors[slot] = self._mapped(slot)
        return self.tensors[slot]

    def advance(self, progress: Progress) -> None:
        """Notes what is finished, in a cache so that it outlives a kill."""
        self.progress = progress
        if self.cache is not None:
            for pages in self.maps.values():
                pages.flush()
            self.cache.save(progress)

    def finish(self) -> None:
        """Removes what only served to compute the last stage.

        The last hidden states of a cache are mapped again, so that what the caller writes into them
        stays in memory.
        """
        other = (self.last_stage + 1) % 2
        for slot in (0, 1) if self.cache is not None else (other,):
            self.tensors.pop(slot, None)
            self.maps.pop(slot, None)
        if self.cache is not None:
            with contextlib.suppress(OSError):  # a finished cache may be read-only
                self.cache.states_file(other).unlink(missing_ok=True)

    def _check_files(self, cache: "Cache") -> None:
        """Raises ValueError for an impossible record, or without the files that it speaks of."""
        stage, pieces, state = self.progress
        most = -(-self.shape[0] // int(cache.marks["piece"]))
        if not 0 < stage <= self.last_stage:
            most = 0  # only layers note their pieces
        if not (0 <= stage <= self.last_stage + 1 and 0 <= pieces <= most):
            raise ValueError(cache.not_ours)
        if (pieces > 0) != (state is not None):
            raise ValueError(cache.not_ours)
        if not (cache.writable or self.finished):
            raise ValueError(
                f"cache={str(cache.folder)!r} cannot be written: expected a folder that can, or a"
                " finished cache"
            )
        needed = [stage - 1] * (stage > 0) + [stage] * (pieces > 0)
        for path in (cache.states_file(n % 2) for n in needed):
            if not path.is_file() or path.stat().st_size != self._file_size():
                raise ValueError(
                    f"cache={str(cache.folder)!r}: {path.name} is missing or has another size than"
                    " encode_long gave it; expected an empty folder"
                )

    def _file_size(self) -> int:
        return len(self.header) + self.shape[0] * self.shape[1] * self.dtype.itemsize

    def _reserve(self, memory_if_full: bool) -> None:
        """Takes the room for both tensors before any work; raises ValueError if there is none."""
        try:
            self._check_space()
            for slot in (0, 1):
                self.of_stage(slot)
        except (OSError, ValueError) as error:
            self.tensors.clear()
            self.maps.clear()
            self.in_memory = memory_if_full
            if memory_if_full:
                return
            if isinstance(error, ValueError):
                raise
            size = 2 * self._file_size() / 2**30
            raise ValueError(
                f"no files for {size:.2f} GiB of hidden states ({error}): expected a folder for"
                " temporary files with room for them, or another cache="
            ) from error

    def _check_space(self) -> None:
        """Raises ValueError if the disk does not hold both files."""
        folder, there = Path(tempfile.gettempdir()), 0
        if self.cache is not None:
            folder = self.cache.folder
            files = [path for path in map(self.cache.states_file, (0, 1)) if path.exists()]
            there = sum(path.stat().st_size for path in files)
        missing = 2 * self._file_size() - there
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise ValueError(
                f"{folder} has {free / 2**30:.2f} GiB free: expected {missing / 2**30:.2f} GiB for"
                " hidden states; cache= names another folder"
            )

    def _mapped(self, slot: int) -> torch.Tensor:
        size = self._file_size()
        if self.cache is None:
            with tempfile.TemporaryFile(prefix="lion-long-") as file:
                pages = _map(file, self.header, size)
        elif self.finished:
            with open(self.cache.states_file(slot), "rb") as file:
                pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        else:
            path = self.cache.states_file(slot)
            with open(path, "r+b" if path.exists() else "w+b") as file:
                pages = _map(file, self.header, size)
        self.maps[slot], buffer = pages, cast(Any, pages)
        count = self.shape[0] * self.shape[1]
        flat = torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=len(self.header))
        return flat.view(self.shape)


class Cache:
    """A folder in which the work on one document by one model can be continued.

    Args:
        folder: made if it does not exist.
        marks: what the work depends on, by name; see `fingerprints`.
        sample: some last hidden states, (tokens, hidden), by which the model is known again.

    Raises:
        ValueError: for a cache of something else, one that another process uses, or what is no
            folder and cannot be made one.
    """

    def __init__(self, folder: Any, marks: dict[str, str], sample: torch.Tensor):
        self.folder, self.marks, self.sample = folder_of(folder), marks, sample
        self.not_ours = f"cache={str(folder)!r}: {RECORD} was not written by encode_long"
        self.writable = True
        self.progress = Progress()

    def states_file(self, slot: int) -> Path:
        return self.folder / f"hidden_states_{slot}.safetensors"

    @contextlib.contextmanager
    def held(self) -> Iterator["Cache"]:
        """Holds the folder for this process, and reads how far the work has come."""
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context(open(self.folder / LOCK, "ab"))
            except OSError:
                self.writable = False  # which is no harm if it is finished
            if fcntl is not None and self.writable:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ValueError(
                        f"cache={str(self.folder)!r} is in use by another process: expected a"
                        " folder of its own for each document"
                    ) from error
                except OSError as error:
                    logger.warning(
                        "cache=%r: its filesystem has no locks (%s), so make sure that no other"
                        " process uses it",
                        str(self.folder),
                        error,
                    )
            self.progress = self._read()
            yield self

    def save(self, progress: Progress) -> None:
        """Replaces the record; raises ValueError if the disk is full."""
        try:
            self._write(progress)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"cache={str(self.folder)!r}: {RECORD} cannot be written ({error}): expected a disk"
                " with room; the same call then goes on"
            ) from error

    def _write(self, progress: Progress) -> None:
        tensors, state = {"sample": self.sample.contiguous()}, progress.state
        if state is not None:
            tensors["key_value"] = state.key_value.cpu().contiguous()
            if state.log_decay is not None:
                tensors["log_decay"] = state.log_decay.cpu().contiguous()
        numbers = {"stage": str(progress.stage), "pieces": str(progress.pieces)}
        new = self.folder / f"{RECORD}.new"
        save_file(tensors, new, metadata={**self.marks, **numbers})
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, self.folder / RECORD)

    def _read(self) -> Progress:
        path = self.folder / RECORD
        if not path.exists():
            return Progress()
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stage, pieces = int(found["stage"]), int(found["pieces"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(self.not_ours) from error
        other = [name for name, mark in self.marks.items() if found.get(name) != mark]
        if not other and not alike(tensors.get("sample"), self.sample):
            other = ["model"]
        for name in other:
            raise ValueError(
                f"cache={str(self.folder)!r} belongs to another {name}: expected an empty"
                f" folder, or the {name} that it was begun with"
            )
        state = None
        if "key_value" in tensors:
            state = BorderState(tensors["key_value"], tensors.get("log_decay"))
        return Progress(stage, pieces, state)


def folder_of(cache: Any) -> Path:
    """The folder of a cache, made if it does not exist."""
    if not isinstance(cache, str | os.PathLike) or not os.fspath(cache):
        raise ValueError(f"cache={cache!r:.60}: expected the name of a folder")
    try:
        folder = Path(cache)
        if folder.is_file():
            raise ValueError(f"cache={str(cache)!r} is a file: expected a folder")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"cache={str(cache)!r} cannot be made ({error}): expected a folder"
        ) from error
    return folder


def _header(shape: tuple[int, int], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file with one tensor, so long that the tensor is aligned."""
    size = shape[0] * shape[1] * dtype.itemsize
    entry = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"hidden_states": entry}).encode()
    text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)
    return struct.pack("<Q", len(text)) + text


def _map(file: Any, header: bytes, size: int) -> mmap.mmap:
    """Maps a file of a size into memory, whose place on the disk is taken before."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk would end the process otherwise
    pages = mmap.mmap(file.fileno(), size)
    pages[: len(header)] = header
    return pages
