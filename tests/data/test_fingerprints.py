"""Fingerprints of files change with their content, and cost little."""

import json
import os
import time

import pytest

from lion_hf.data.fingerprints import fingerprint


def test_a_change_shows(tmp_path):
    file = tmp_path / "train.txt"
    seen = []
    for content in (b"", b"one", b"two", b"x" * 5_000_000, b"x" * 4_999_999 + b"y"):
        file.write_bytes(content)
        seen.append(fingerprint([file]))
        assert seen[-1]["train.txt"]["size"] == len(content)
    assert len({json.dumps(found) for found in seen}) == 5
    os.utime(file, (0, 0))
    assert fingerprint([str(file)]) == seen[-1]
    assert fingerprint([]) == {}


def test_names_are_relative_and_folders_may_move(tmp_path):
    for place in ("here", "there"):
        for name in ("a/x.png", "b/x.png", ".hidden/x.png", "b/._x.png"):
            (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place / name).write_text(name)
    here, there = (fingerprint([tmp_path / place]) for place in ("here", "there"))
    assert here == there and list(here) == ["a/x.png", "b/x.png"]


def test_many_files_give_few_entries(tmp_path):
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_text(str(number % 10))
    before = fingerprint([tmp_path])
    assert before.keys() == {"files", "size", "digest"}
    assert (before["files"], before["size"]) == (100, 100)
    (tmp_path / "050.txt").rename(tmp_path / "050b.txt")
    assert fingerprint([tmp_path])["digest"] != before["digest"]


def test_each_of_many_small_files_counts(tmp_path):
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_text(str(number % 10))
    before = fingerprint([tmp_path])
    for number in range(100):
        file = tmp_path / f"{number:03}.txt"
        file.write_text("x")
        assert fingerprint([tmp_path])["digest"] != before["digest"], file.name
        file.write_text(str(number % 10))
    assert fingerprint([tmp_path]) == before


def test_a_huge_file_costs_little(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(100 << 30)
    start = time.perf_counter()
    assert fingerprint([tmp_path / "huge"])["huge"]["size"] == 100 << 30
    assert time.perf_counter() - start < 2


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fingerprint([tmp_path / "nowhere"])
