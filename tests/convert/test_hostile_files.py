"""`lion-hf convert` refuses hostile files in seconds and little memory, and writes nothing."""

import pytest
from support.hostile_files import check_refusals, hostile_files


@pytest.mark.slow
def test_hostile_files_are_refused_cheaply(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "place").mkdir()
    files = hostile_files(tmp_path / "files")
    answers = check_refusals("convert_checkpoint", files, tmp_path / "place")
    assert not any("executed" in answer for answer in answers.values())
    assert "folder, expected a file" in answers["a folder with code"]
