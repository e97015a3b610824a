"""What a run is asked to do: only evaluate or predict, and never to continue with other data."""

import json
import math
import os
import re
from dataclasses import dataclass

import pytest
from support.models import model, text_config
from support.trainers import Rows, trainer

from lion_hf.training import checkpoints
from lion_hf.training.arguments import LionTrainingArguments
from lion_hf.training.run import run


def files(folder) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.stat().st_size)
        for file in folder.rglob("*")
        if file.is_file()
    }


def make(folder, **settings):
    made = trainer(folder, **settings)
    made.eval_dataset = Rows()
    return made


def test_evaluation_only_leaves_the_run_as_it_is(tmp_path):
    folder = tmp_path / "run"
    metrics = run(make(folder, max_steps=4), title="A run")
    before = files(folder)
    again = make(folder, max_steps=40, do_train=False, do_eval=True)
    found = run(again, title="A run")
    assert again.state.global_step == 0
    assert found["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
    written = json.loads((folder / "eval_metrics.json").read_text())
    assert written["eval_loss"] == found["eval_loss"]
    after = files(folder)
    after.pop("eval_metrics.json")
    assert after == before


def test_evaluation_of_the_model_given_and_of_a_checkpoint(tmp_path):
    given = make(tmp_path / "empty", do_train=False, do_eval=True)
    expected = given.evaluate()["eval_loss"]
    assert run(given, title="A run")["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert [file.name for file in (tmp_path / "empty").iterdir()] == ["eval_metrics.json"]

    network = model("SequenceClassification", text_config())
    first = make(tmp_path / "run", network=network, max_steps=8, learning_rate=1e-2)
    final = run(first, title="A run")["eval_loss"]
    folder = checkpoints.checkpoints(tmp_path / "run")[0]
    assert folder.name == "checkpoint-4"
    older = make(tmp_path / "run", do_train=False, do_eval=True, resume=str(folder))
    assert abs(run(older, title="A run")["eval_loss"] - final) > 1e-4


def test_prediction_only(tmp_path):
    outputs = []
    made = make(tmp_path, do_train=False, do_predict=True)
    run(made, title="A run", predict_dataset=Rows(), write_predictions=outputs.append)
    assert outputs[0].predictions.shape == (40, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["predict_metrics.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to do"),
        ({"do_predict": True}, "do_predict=True without test data"),
        ({"do_eval": True}, "do_eval=True without validation data"),
    ],
)
def test_nothing_to_do(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(trainer(tmp_path / "run", do_train=False, **settings), title="A run")
    assert not list(tmp_path.rglob("*.json"))


DATA = {"train": {"a.txt": {"size": 3, "hash": "0a"}}, "classes": ["cat", "dog"], "rows": "packed"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["cat", "cow"]}, r"classes\[1\] was 'dog' and is 'cow'"),
        ({"classes": ["cat"]}, r"classes was \['cat', 'dog'\] and is \['cat'\]"),
        ({"train": {"a.txt": {"size": 4, "hash": "0a"}}}, r"\['size'\] was 3 and is 4"),
        ({"train": {}}, r"train\['a.txt'\] was .* and is gone"),
        ({"vocab_size": 7}, "vocab_size is new: 7"),
        ({"rows": "blocks"}, "rows was 'packed' and is 'blocks'.*choose another output_dir"),
    ],
)
def test_a_run_does_not_continue_with_other_data(tmp_path, change, message):
    run(make(tmp_path, max_steps=4), title="A run", data=DATA)
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(make(tmp_path, max_steps=8), title="A run", data=DATA | change)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert run(make(tmp_path, max_steps=5), title="A run", data=DATA)["train_loss"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier_pooling": "mean"}, "classifier_pooling was 'cls' and is 'mean'"),
        ({"hidden_size": 48}, "hidden_size was 24 and is 48"),
        ({"mask_type": "decay"}, "mask_type was 'selective' and is 'decay'.*choose another output"),
    ],
)
def test_a_run_does_not_continue_with_another_model(tmp_path, change, message):
    """Other pooling gave weights of both, other sizes the traceback of a library."""
    own = {"classifier_pooling": "cls", "hidden_size": 24, "mask_type": "selective"}

    def network(**fields):
        return model("SequenceClassification", text_config(**own | fields))

    run(make(tmp_path, network=network(), max_steps=4), title="A run")
    with pytest.raises(ValueError, match=message):
        run(make(tmp_path, network=network(**change), max_steps=8), title="A run")
    free = network(attention_form="recurrent", hidden_dropout_prob=0.2)
    assert run(make(tmp_path, network=free, max_steps=5), title="A run")["train_loss"] > 0


def test_a_run_of_an_older_version_continues_with_a_warning(tmp_path, caplog):
    run(make(tmp_path, max_steps=4), title="A run")
    run(make(tmp_path, max_steps=5), title="A run", data=DATA)
    assert "has no data.json" in caplog.text


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\x00"])
def test_a_broken_description_of_the_data(tmp_path, content):
    run(make(tmp_path, max_steps=4), title="A run", data=DATA)
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match="data.json cannot be read.*Remove it"):
        run(make(tmp_path, max_steps=5), title="A run", data=DATA)


def test_evaluation_is_what_was_asked_for(tmp_path):
    for asked in (False, True):
        given = {"do_train": False, "do_eval": asked, "eval_strategy": "epoch"}
        assert LionTrainingArguments(str(tmp_path), use_cpu=True, **given).do_eval == asked


@pytest.mark.parametrize("name", ["file", "file/below/it"])
def test_a_file_is_no_output_folder(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    message = f"output_dir={str(tmp_path / name)!r}: {tmp_path / 'file'} is a file"
    with pytest.raises(ValueError, match=re.escape(message)):
        LionTrainingArguments(str(tmp_path / name), use_cpu=True)


def test_a_folder_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    """Permissions do not bind root, who may run these tests: the answer is the system's."""
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    message = f"output_dir={str(tmp_path / 'a' / 'b')!r}: {tmp_path} may not be written to"
    with pytest.raises(ValueError, match=re.escape(message)):
        LionTrainingArguments(str(tmp_path / "a" / "b"), use_cpu=True)
    (tmp_path / "c").mkdir()
    LionTrainingArguments(str(tmp_path / "c" / "d"), use_cpu=True)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_train_epochs", 0),
        ("num_train_epochs", -1.0),
        ("num_train_epochs", math.nan),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", -2),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", math.inf),
        ("learning_rate", -1.0),
        ("weight_decay", math.nan),
    ],
)
def test_numbers_with_which_nothing_is_learnt_are_refused(name, value, tmp_path):
    """A run of -1 epochs ended well, with random weights, and an infinite rate after its steps."""
    with pytest.raises(ValueError, match=f"^{name}={value}: expected"):
        LionTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})
    if name == "num_train_epochs":
        LionTrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, num_train_epochs=value)


@dataclass
class Settings:
    model: str


@pytest.mark.parametrize("name, same", [("./base", True), ("base", True), ("other", False)])
def test_a_finished_run_is_known_by_any_path_of_its_model(
    name, same, tmp_path, monkeypatch, caplog
):
    """With or without a slash at its end; the model that the run began with was evaluated."""
    monkeypatch.chdir(tmp_path)
    run(make("run", max_steps=1), title="A run", settings=[Settings("base/")])
    again = make("run", do_train=False, do_eval=True)
    run(again, title="A run", settings=[Settings(name)])
    assert f"the model is that of {'run' if same else 'the trainer'}" in caplog.text
