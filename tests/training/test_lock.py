"""One run per folder: a lock that names its holder and dies with it."""

import contextlib
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from support.trainers import trainer

from lion_hf.tasks import mlm
from lion_hf.training import lock, run_state
from lion_hf.training.run import run

kept = []
HELD = f"is in use by process [0-9]+ on {re.escape(socket.gethostname())}, since 2"


def child(work) -> int:
    """The number of a forked process that does the work, reports, and waits to be killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writer, b"ready")
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read(5) == b"ready"
    return pid


def hold(folder: Path) -> None:
    """Takes a lock for the rest of this process's life."""
    kept.append(lock.folder_lock(folder))
    kept[-1].__enter__()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder."""
    pid = child(lambda: hold(tmp_path))
    yield pid
    with contextlib.suppress(ProcessLookupError):
        kill(pid)


def test_a_second_run_is_told_who_runs_and_changes_nothing(tmp_path, holder):
    for attempt in (lambda made: run(made, title="A run"), lambda made: made.train()):
        with pytest.raises(ValueError, match=HELD) as error:
            attempt(trainer(tmp_path))
        assert f"process {holder} " in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK_FILE]
    kill(holder)
    trainer(tmp_path).train()
    assert not (tmp_path / lock.LOCK_FILE).exists()


def test_no_tokenizer_is_trained_into_a_folder_in_use(tmp_path, holder):
    text = tmp_path.parent / "text.txt"
    text.write_text("some words\n" * 40)
    files = ["--train_file", str(text), "--validation_file", str(text)]
    with pytest.raises(SystemExit, match=HELD):
        mlm.main([*files, "--train_tokenizer", "--output_dir", str(tmp_path), "--use_cpu"])
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK_FILE]


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.folder_lock(tmp_path):
        pid = child(lambda: pytest.raises(ValueError, hold, tmp_path))
        kill(pid)
        raise ZeroDivisionError
    with lock.folder_lock(tmp_path), lock.folder_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_workers_do_not_keep_the_lock_of_a_killed_run(tmp_path):
    """Data loaders fork, and their processes live for some seconds after the run's."""

    def work():
        hold(tmp_path)
        worker = child(lambda: None)
        Path(tmp_path, "worker").write_text(str(worker))

    kill(child(work))
    worker = int(Path(tmp_path, "worker").read_text())
    os.kill(worker, 0)  # it lives
    with lock.folder_lock(tmp_path):
        os.kill(worker, signal.SIGKILL)


def test_other_processes_of_a_killed_run_keep_its_folder(tmp_path, holder):
    orphan = child(lambda: kept.append(lock._join(tmp_path)))
    kill(holder)
    with (
        pytest.raises(ValueError, match=rf"process {holder} .*it has ended, but others"),
        lock.folder_lock(tmp_path),
    ):
        pass
    kill(orphan)
    with lock.folder_lock(tmp_path):
        pass


def test_a_finished_run_is_not_redone_while_it_runs(tmp_path):
    run_state.begin(tmp_path, {"seed": 1})
    pid = child(lambda: hold(tmp_path))
    with pytest.raises(ValueError, match=HELD):
        run_state.finished(tmp_path, {"seed": 1}, redo=True)
    assert (tmp_path / run_state.STATE_FILE).is_file()
    kill(pid)
    assert run_state.finished(tmp_path, {"seed": 1}, redo=True) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": 1}', b"[]", b"\xff"])
def test_a_lock_without_a_name(tmp_path, holder, content):
    Path(tmp_path, lock.LOCK_FILE).write_bytes(content)
    with (
        pytest.raises(ValueError, match="is in use by another process. Wait"),
        lock.folder_lock(tmp_path),
    ):
        pass


def test_a_filesystem_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock, "_lock", refuse)
    with lock.folder_lock(tmp_path):
        assert "its filesystem has no locks" in caplog.text
