"""One run per folder: a lock that the operating system drops when its process ends.

Every process of a run holds the lock, so a folder stays locked while one of them is alive, also
after its launcher was killed. Across machines this works where the filesystem passes locks on to
its server (NFS does, Lustre when mounted with `-o flock`). Elsewhere the lock holds for one
machine; a filesystem without locks gives a warning.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil
from accelerate.utils import gather_object
from transformers import TrainingArguments

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
FAR = 1 << 20  # Windows lets nobody read a locked byte, so it is one behind the holder's name

_held: dict[str, BinaryIO | None] = {}  # folder -> its lock, None where the filesystem has none


@contextlib.contextmanager
def run_lock(args: TrainingArguments) -> Iterator[None]:
    """Holds `args.output_dir` for a run, in all of its processes; inside another `run_lock` too.

    Raises:
        ValueError: in all processes, if another run holds the folder; it says which.
    """
    folder = str(Path(args.output_dir).resolve())
    if folder in _held:
        yield
        return
    lock = problem = None
    if args.should_save:
        try:
            lock = _acquire(Path(folder))
        except ValueError as error:
            problem = str(error)
    problems = [found for found in gather_object([problem]) if found is not None]
    if problems:
        _release(lock, Path(folder))
        raise ValueError(problems[0])
    if not args.should_save:
        lock = _join(Path(folder))
    _held[folder] = lock
    try:
        yield
    finally:
        _release(_held.pop(folder), Path(folder))


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Holds a run's folder in this process alone, for work on it between runs.

    Raises:
        ValueError: if a run holds the folder; it says which.
    """
    folder = str(Path(folder).resolve())
    if folder in _held:
        yield
        return
    _held[folder] = _acquire(Path(folder))
    try:
        yield
    finally:
        _release(_held.pop(folder), Path(folder))


def _acquire(folder: Path) -> BinaryIO | None:
    """The folder's lock, with this process named in it; None if the filesystem has no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        handle = path.open("a+b", buffering=0)
        try:
            _lock(handle, exclusive=True)
        except OSError as error:
            if error.errno in BUSY:
                raise ValueError(_busy(folder, handle)) from error
            handle.close()
            logger.warning(
                "%s: its filesystem has no locks (%s), so make sure that no other run uses it",
                folder,
                error,
            )
            return None
        if _is_file(handle, path):  # and not one that its holder has just deleted
            break
        handle.close()
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    handle.truncate(0)
    handle.write(json.dumps(holder).encode())
    try:
        _lock(handle, exclusive=False)  # the run's other processes join
    except OSError as error:  # another run was quicker
        raise ValueError(_busy(folder, handle)) from error
    return handle


def _join(folder: Path) -> BinaryIO | None:
    """The lock that the first process holds, for another one of the run."""
    if fcntl is None:
        return None
    try:
        handle = (folder / LOCK_FILE).open("rb")
        _lock(handle, exclusive=False)
    except OSError:  # another machine's folder, or one without locks: the first process has warned
        return None
    return handle


def _release(handle: BinaryIO | None, folder: Path) -> None:
    """Gives a lock back. The last process of the run deletes the file."""
    if handle is None:
        return
    with contextlib.suppress(OSError):
        if handle.writable():
            _lock(handle, exclusive=True)
            (folder / LOCK_FILE).unlink()
    handle.close()


def _lock(handle: BinaryIO, exclusive: bool) -> None:
    if fcntl is not None:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    elif exclusive:
        handle.seek(FAR)
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)


def _is_file(handle: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _busy(folder: Path, handle: BinaryIO) -> str:
    """The message for a folder that is held, by the name in the lock; closes the lock."""
    with handle:
        handle.seek(0)
        content = handle.read(4096)
    try:
        holder = json.loads(content)
        host, pid, since = holder["host"], int(holder["pid"]), holder["since"]
    except (ValueError, TypeError, KeyError):
        by = "another process"
    else:
        by = f"process {pid} on {host}, since {since}"
        if host == socket.gethostname() and not psutil.pid_exists(pid):
            by += " (it has ended, but others of its run have not)"
    return (
        f"{folder} is in use by {by}. Wait for that run, or stop all of its processes, or choose"
        " another folder to write to"
    )


def _leave_to_parent() -> None:
    """Closes the locks in a forked child, which would keep them after its parent's end."""
    for handle in _held.values():
        if handle is not None:
            handle.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
