"""A folder that cannot be written is refused before there is anything to lose."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from lion_hf.folders import WRITER as WRITER_FILE
from lion_hf.folders import check_new_folder, new_folder, whole_file

WRITER = """
import sys, time
from lion_hf.folders import new_folder
with new_folder(sys.argv[1]) as folder:
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(1000))
    print("written", flush=True)
    time.sleep(600)
"""


HALF_A_FILE = """
import pathlib, sys, time
from lion_hf.folders import whole_file
with whole_file(pathlib.Path(sys.argv[1])) as file:
    file.write("half\\n" * 100_000)
    print("written", flush=True)
    time.sleep(600)
"""


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "predictions.csv"
    with whole_file(file) as handle:
        handle.write("before\n")
    with pytest.raises(KeyboardInterrupt), whole_file(file) as handle:
        handle.write("half")
        raise KeyboardInterrupt
    assert file.read_text() == "before\n" and [*tmp_path.iterdir()] == [file]
    program = [sys.executable, "-c", HALF_A_FILE, str(file)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"written\n"
        writer.kill()
    assert file.read_text() == "before\n"
    with whole_file(file) as handle:  # over what the killed process left
        handle.write("after\n")
    assert file.read_text() == "after\n" and [*tmp_path.iterdir()] == [file]


def test_new_and_empty_folders_are_taken(tmp_path):
    assert check_new_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert check_new_folder(tmp_path) == tmp_path
    assert not [*tmp_path.iterdir()]  # it only looks


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder: choose another output"):
        check_new_folder(tmp_path / "file" / "a" / "b")
    with pytest.raises(ValueError, match="is not an empty folder"):
        check_new_folder(tmp_path / "file")


def test_a_place_without_permission_is_refused(tmp_path, monkeypatch):
    """Permissions do not bind root, who may run these tests: the answer is the system's."""
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(ValueError, match=f"because {tmp_path} may not be written to"):
        check_new_folder(tmp_path / "a" / "b")
    (tmp_path / "c").mkdir()
    assert check_new_folder(tmp_path / "c" / "d")


@pytest.mark.skipif(sys.platform == "win32", reason="another limit")
def test_a_name_too_long_for_the_hidden_folder_is_refused_before_the_work(tmp_path):
    fits = tmp_path / ("é" * 122 + "x")  # 245 bytes; the hidden folder's name has 10 more
    with new_folder(check_new_folder(fits)) as folder:
        folder.mkdir()
    for more in (1, 11):
        with pytest.raises(ValueError, match="the name is too long; choose a shorter one"):
            check_new_folder(f"{fits}{'x' * more}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), OSError),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), OSError),
        (Exception("No space left on device (os error 28)"), OSError),  # as tokenizers raises it
        (RuntimeError("another"), RuntimeError),
    ],
)
def test_a_full_disk_is_one_error_whatever_writes(error, kind, tmp_path):
    with pytest.raises(kind, match=re.escape(str(error))) as found, new_folder(tmp_path / "out"):
        raise error
    assert type(found.value) is kind
    assert (f"{tmp_path / 'out'} could not be written" in str(found.value)) == (kind is OSError)
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_the_next_writer_deletes_what_a_killed_one_left(tmp_path):
    output = tmp_path / "out[1]"

    def writer() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(output)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "written\n"
        return process

    killed, alive = writer(), writer()
    try:
        assert len([*tmp_path.iterdir()]) == 2  # a living writer's folder stays
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with new_folder(output) as folder:
            folder.mkdir()
            assert len([*tmp_path.iterdir()]) == 2  # the living one's and this one's
        assert output.is_dir()
    finally:
        alive.terminate()
        alive.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
@pytest.mark.parametrize("name, host", [(".out.abcdefgh", "another"), (".out.v2.abcdefg", None)])
def test_what_others_left_stays(name, host, tmp_path):
    """Another host's locks may not be seen, and another output's folder is not this one's."""
    (tmp_path / name).mkdir()
    (tmp_path / name / WRITER_FILE).write_text(host or socket.gethostname())
    with new_folder(tmp_path / "out") as folder:
        folder.mkdir()
    assert (tmp_path / name / WRITER_FILE).is_file()
