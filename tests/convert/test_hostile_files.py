"""`lion-hf convert` refuses hostile files in seconds and little memory, and writes nothing."""

import pytest
from support.hostile_files import cost_of, hostile_files

MOST_SECONDS, MOST_MEBIBYTES = 10, 500


@pytest.mark.slow
def test_hostile_files_are_refused_cheaply(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "place").mkdir()
    files = hostile_files(tmp_path / "files")
    here = sorted(tmp_path.rglob("*"))
    costs = cost_of("convert_checkpoint", files, tmp_path / "place")
    assert costs.keys() == files.keys()
    for name, (answer, seconds, mebibytes) in costs.items():
        honest = files[name].stat().st_size / 2**20 if files[name].is_file() else 0
        assert answer != "accepted" and "executed" not in answer, (name, answer)
        assert not answer.startswith("RAW") and answer.isprintable() and len(answer) <= 1000, (
            name,
            answer,
        )
        assert seconds < MOST_SECONDS, (name, seconds)
        assert mebibytes < MOST_MEBIBYTES + 2 * honest, (name, mebibytes)
    assert "folder, expected a file" in costs["a folder with code"][0]
    assert sorted(tmp_path.rglob("*")) == here  # no output, nothing unpacked
