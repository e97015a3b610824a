"""Files of earlier runs that are broken are named in one line; results are compared by settings."""

import json

import pytest
from support.trainers import trainer

from lion_hf.training import checkpoints, run_state
from lion_hf.training.run import run
from lion_hf.training.stream_trainer import StreamingTrainer

SETTINGS = {"seed": 1, "rate": 0.1}


def test_a_finished_run_has_its_metrics(tmp_path):
    assert run_state.finished(tmp_path, SETTINGS) is None
    run_state.begin(tmp_path, SETTINGS)
    assert run_state.finished(tmp_path, SETTINGS) is None
    run_state.finish(tmp_path, SETTINGS, {"accuracy": 0.5})
    assert run_state.finished(tmp_path, SETTINGS) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="rate was 0.1 and is 0.2"):
        run_state.finished(tmp_path, SETTINGS | {"rate": 0.2})


def test_a_run_of_an_older_version_is_still_finished(tmp_path):
    """It kept what it was asked to do among its settings."""
    old = SETTINGS | {"do_train": False, "do_eval": True, "do_predict": False}
    run_state.finish(tmp_path, old, {"accuracy": 0.5})
    assert run_state.finished(tmp_path, SETTINGS) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "[]", "{}", '{"settings": 3}', '{"settings": {}, "metrics": 3}', "[" * 99999],
    ids=lambda content: content[:12],
)
def test_a_broken_file_is_named_with_the_cure(tmp_path, content):
    (tmp_path / run_state.STATE_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"run.json cannot be read .*: remove it .*, or redo$"):
        run_state.finished(tmp_path, SETTINGS)
    assert run_state.finished(tmp_path, SETTINGS, redo=True) is None


def test_redo_deletes_only_what_a_run_wrote(tmp_path):
    run_state.finish(tmp_path, SETTINGS, {"accuracy": 0.5})
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.begin(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-4").mkdir()
    assert run_state.finished(tmp_path, SETTINGS, redo=True) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "notes.txt"]
    assert run_state.finished(tmp_path / "nowhere", SETTINGS, redo=True) is None
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"unknown": 3}'])
def test_a_broken_state_of_the_trainer(tmp_path, content):
    """Sealed as it is, so that the manifest does not tell."""
    run(trainer(tmp_path, max_steps=4), title="A run")
    file = tmp_path / "checkpoint-4" / "trainer_state.json"
    file.write_text(content)
    checkpoints.seal(file.parent)
    with pytest.raises(
        ValueError, match=r"trainer_state.json cannot be read .*remove checkpoint-4"
    ):
        run(trainer(tmp_path, max_steps=8), title="A run")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"- a", b"[" * 99999])
def test_broken_settings_give_a_warning(tmp_path, content, caplog):
    run(trainer(tmp_path, max_steps=4), title="A run")
    (tmp_path / "settings.yaml").write_bytes(content)
    run(trainer(tmp_path, max_steps=5, learning_rate=2e-3), title="A run")
    assert "settings.yaml cannot be read and is not compared" in caplog.text
    assert json.loads((tmp_path / "metrics.json").read_text())["train_loss"] > 0


PLACES = {"processes": 1, "workers": 1, "last_reader": 0, "places": {"0": [3, 4]}}


def test_places_of_a_stream(tmp_path):
    made = trainer(tmp_path, cls=StreamingTrainer)
    file = tmp_path / "checkpoint-4" / "stream-0.json"
    file.parent.mkdir()
    file.write_text(json.dumps(PLACES))
    assert made._saved_places(str(file.parent), 1) == ({0: (3, 4)}, 0)
    with pytest.raises(ValueError, match="a stream continues as it began, with 1 of 1"):
        made._saved_places(str(file.parent), 2)
    for content in ("", "[]", "{}", "null", json.dumps(PLACES | {"places": [1]})):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"stream-0.json cannot be read .*remove checkpoint-4"):
            made._saved_places(str(file.parent), 1)
    file.unlink()
    with pytest.raises(ValueError, match=r"stream-0.json cannot be read"):
        made._saved_places(str(file.parent), 1)
