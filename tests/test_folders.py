"""A folder that cannot be written is refused before there is anything to lose."""

import os

import pytest

from lion_hf.folders import check_new_folder


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
