"""`lion-hf linearize` keeps its budget, and goes on after a kill or Ctrl-C where it stopped."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.softmax_models import softmax_model, stop_at
from transformers import BertTokenizer

from lion_hf.linearize import budget, learning, stage
from lion_hf.linearize.checkpoint import linearize_checkpoint
from lion_hf.linearize.held_out import HeldOut
from lion_hf.linearize.settings import Distillation
from lion_hf.training.checkpoints import checkpoints, damage

pytest_plugins = ["support.softmax_models"]  # its fixtures

ROOT = Path(__file__).parents[2]
LONG_ENOUGH = 300  # seconds for a child on a busy machine


@pytest.fixture
def encoder(tmp_path):
    """A folder with a random BERT without a head, its tokenizer, and text beside it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
    softmax_model("BertModel", vocab_size=len(words)).save_pretrained(tmp_path / "source")
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(
        tmp_path / "source"
    )
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 16, (80, 10), generator=generator).tolist()
    lines = [" ".join("abcdefghijklmnop"[n] for n in row) for row in numbers]
    (tmp_path / "train.txt").write_text("\n".join(lines[:60]))
    (tmp_path / "other.txt").write_text("\n".join(lines[60:]))
    return tmp_path / "source"


def options(place: Path, **more) -> Distillation:
    usual = {"train_file": str(place / "train.txt"), "batch_size": 4, "max_length": 16}
    return Distillation(**{**usual, "layer_steps": 6, "steps": 6, **more})


def command(place: Path, *more: str) -> list[str]:
    return [
        *[sys.executable, "-m", "lion_hf", "linearize", str(place / "source"), str(place / "lion")],
        *["--train_file", str(place / "train.txt"), "--batch_size", "4", "--max_length", "16"],
        *more,
    ]


def run(words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("step", [2, 6, 9])
def test_an_interrupted_run_ends_with_the_weights_of_an_unbroken_one(
    step, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(learning, "bf16_is_faster", lambda _: step == 6)
    made = linearize_checkpoint(encoder, tmp_path / "whole", distillation=options(tmp_path))
    stop_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        linearize_checkpoint(encoder, tmp_path / "lion", distillation=options(tmp_path))
    assert not (tmp_path / "lion").exists()
    (checkpoint,) = checkpoints(tmp_path / "lion.run")
    assert damage(checkpoint) is None
    monkeypatch.undo()
    # A machine that is busy, or another one, would choose otherwise.
    monkeypatch.setattr(learning, "bf16_is_faster", lambda _: step != 6)
    steps, own = [], stage.Learner._step
    monkeypatch.setattr(stage.Learner, "_step", lambda *a: (steps.append(1), own(*a))[1])
    again = linearize_checkpoint(encoder, tmp_path / "lion", distillation=options(tmp_path))
    assert len(steps) == 12 - step
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "lion")]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    assert made.metrics == again.metrics
    assert not (tmp_path / "lion.run").exists()


def test_the_output_may_be_in_the_folder_of_the_images(image_source, tmp_path, monkeypatch):
    """As with `--data_path .` and a log there: what is not read may change, what is may not."""
    root = tmp_path / "images"
    lessons = Distillation(data_path=str(root), batch_size=2, layer_steps=0, steps=3)
    stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        linearize_checkpoint(image_source, root / "out", distillation=lessons)
    monkeypatch.undo()
    assert (root / "out.run").is_dir()
    added = shutil.copyfile(root / "train" / "dark" / "0.png", root / "train" / "dark" / "9.png")
    with pytest.raises(ValueError, match="the content of data_path was"):
        linearize_checkpoint(image_source, root / "out", distillation=lessons)
    added.unlink()
    (root / "log.txt").write_text("a line")
    linearize_checkpoint(image_source, root / "out", distillation=lessons)
    assert not (root / "out.run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 8}, "batch_size was 4 and is 8"),
        ({"steps": 7}, "steps was 6 and is 7"),
        ({"train_file": "other.txt"}, "train_file was .*train.txt.* and is .*other.txt"),
        ("data", "the content of train_file was '[0-9a-f]+' and is '[0-9a-f]+'"),
        ("pattern", "the content of train_file was '[0-9a-f]+' and is '[0-9a-f]+'"),
        ("source", "the source was '[0-9a-f]+' and is '[0-9a-f]+'"),
    ],
    ids=["batch", "steps", "file", "data", "pattern", "source"],
)
def test_a_run_does_not_go_on_with_other_settings(change, words, encoder, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    usual = {"train_file": str(tmp_path / "tra*.txt")} if change == "pattern" else {}
    with pytest.raises(KeyboardInterrupt):
        linearize_checkpoint(encoder, tmp_path / "lion", distillation=options(tmp_path, **usual))
    monkeypatch.undo()
    more = change if isinstance(change, dict) else usual
    if "train_file" in more:
        more = {"train_file": str(tmp_path / more["train_file"])}
    if change in ("data", "pattern"):
        (tmp_path / "train.txt").write_text("a b c\n" * 30)
    if change == "source":
        model = softmax_model("BertModel", vocab_size=21)
        model.embeddings.word_embeddings.weight.data.add_(0.1)
        model.save_pretrained(encoder)
    with pytest.raises(ValueError, match=words) as error:
        linearize_checkpoint(encoder, tmp_path / "lion", distillation=options(tmp_path, **more))
    assert "remove" in str(error.value) and "lion.run to start anew" in str(error.value)
    assert checkpoints(tmp_path / "lion.run") and not (tmp_path / "lion").exists()


def test_a_folder_that_is_not_a_runs_stays(encoder, tmp_path):
    (tmp_path / "lion.run").mkdir()
    (tmp_path / "lion.run" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="lion.run exists and is not a run's folder"):
        linearize_checkpoint(encoder, tmp_path / "lion", distillation=options(tmp_path))
    assert [path.name for path in (tmp_path / "lion.run").iterdir()] == ["mine.txt"]


OFTEN = """
import sys
from lion_hf.linearize import budget, stage
from lion_hf.cli import main
stage.SAVE_SECONDS = 0.5
sys.exit(main(["linearize", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_killed_command_goes_on(name, encoder, tmp_path):
    """By the clock. It saves its state more often than a user's run, to keep the test short."""
    words = [sys.executable, "-c", OFTEN, *command(tmp_path, "--budget", "10s")[4:]]
    first, seen = run(words), tmp_path / "lion.run"
    late = time.monotonic() + LONG_ENOUGH
    while _newest(seen) < 8 and first.poll() is None and time.monotonic() < late:
        time.sleep(0.05)
    first.send_signal(getattr(signal, name))
    _, errors = first.communicate(timeout=LONG_ENOUGH)
    assert first.returncode == {"SIGKILL": -9, "SIGINT": 130}[name], errors
    assert not (tmp_path / "lion").exists() and _newest(seen) >= 8
    second = run(words)
    printed, errors = second.communicate(timeout=LONG_ENOUGH)
    assert second.returncode == 0, errors
    (spent,) = re.findall(r"going on after (\d+) s of learning", errors)
    assert 2 <= int(spent) < 10
    assert "LionModel" in printed and " cosine 0." in printed
    assert (tmp_path / "lion" / "model.safetensors").is_file() and not seen.exists()


@pytest.mark.slow
def test_a_killed_command_goes_on_with_its_long_documents(encoder, tmp_path):
    """SIGKILL in the last stage, by the clock."""
    more = ["--max_position_embeddings", "80", "--document_share", "0.7"]
    more += ["--validation_file", str(tmp_path / "other.txt")]
    words = [sys.executable, "-c", OFTEN, *command(tmp_path, "--budget", "20s", *more)[4:]]
    seen, late = tmp_path / "lion.run", time.monotonic() + LONG_ENOUGH
    first = run(words)
    while first.poll() is None and time.monotonic() < late and not _in_documents(seen):
        time.sleep(0.1)
    assert first.poll() is None, first.communicate()
    first.kill()
    _, errors = first.communicate(timeout=LONG_ENOUGH)
    before = _state(seen)
    assert first.returncode == -9 and not (tmp_path / "lion").exists(), errors
    assert _in_documents(seen)
    second = run(words)
    printed, errors = second.communicate(timeout=LONG_ENOUGH)
    assert second.returncode == 0, errors
    assert "going on after" in errors and " cosine 0." in printed
    figures = json.loads((tmp_path / "lion" / "linearize.json").read_text())
    assert figures["steps"]["answers"] == before["steps"]["answers"]  # none of them was repeated
    assert figures["steps"]["documents"] > before["step"]
    assert figures["history"][: len(before["history"])] == before["history"]
    assert figures["clock"] < 30 and not seen.exists()


def _state(folder: Path) -> dict:
    """The plain values of the newest whole checkpoint; none if there is none."""
    for path in reversed(checkpoints(folder)):
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            if damage(path) is None:
                return torch.load(path / "state.pt", weights_only=True)["state"]
    return {}


def _in_documents(folder: Path) -> bool:
    """Whether some steps on long documents are saved."""
    state = _state(folder)
    if not state or state["phase"] >= len(state["phases"]) or state["step"] < 2:
        return False
    phase = state["phases"][state["phase"]]
    return phase["stage"] == "documents" and not phase["trial"]


def _newest(folder: Path) -> int:
    return max((int(path.name[11:]) for path in checkpoints(folder)), default=0)


@pytest.mark.slow
def test_a_budget_is_kept(encoder, tmp_path, caplog, monkeypatch):
    """With longer trials than users get, because this budget is short."""
    monkeypatch.setattr(budget, "TRIAL_SHARE", 0.1)
    monkeypatch.setattr(budget, "TRIAL_STEPS", 1)  # a busy machine does few
    caplog.set_level("INFO", logger="lion_hf.linearize")
    lessons = options(tmp_path, layer_steps=None, steps=None, budget="12s")
    began = time.monotonic()
    made = linearize_checkpoint(encoder, tmp_path / "lion", distillation=lessons)
    assert 10 < time.monotonic() - began < 25
    figures = json.loads((made.folder / "linearize.json").read_text())
    assert 10 < figures["clock"] < 13
    assert [*figures["trials"]] == ["answers"] and len(figures["trials"]["answers"]) == 3
    chosen = f"{figures['rates']['answers']:.2g}"
    assert chosen in figures["trials"]["answers"]
    assert f"learning rate of the stage 'answers': {chosen}" in caplog.text
    assert figures["steps"]["answers"] > 8 and made.metrics["cosine"] > 0.9


@pytest.mark.slow
def test_an_interruption_before_the_first_step_after_the_trials(encoder, tmp_path, monkeypatch):
    """The best trial is in the state then, and no longer beside it."""
    monkeypatch.setattr(budget, "TRIAL_SHARE", 0.1)
    monkeypatch.setattr(budget, "TRIAL_STEPS", 1)
    own = stage.Learner._measure

    def interrupted(self, phase):
        own(self, phase)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(stage.Learner, "_measure", interrupted)
    lessons = options(tmp_path, layer_steps=None, steps=None, budget="20s")
    with pytest.raises(KeyboardInterrupt):
        linearize_checkpoint(encoder, tmp_path / "lion", distillation=lessons)
    before = _state(tmp_path / "lion.run")
    assert before["step"] == 0 and len(before["trials"]["answers"]) == 3 and before["rates"]
    monkeypatch.setattr(stage.Learner, "_measure", own)
    made = linearize_checkpoint(encoder, tmp_path / "lion", distillation=lessons)
    figures = json.loads((made.folder / "linearize.json").read_text())
    assert figures["steps"]["answers"] > before["steps"]["answers"] > 0
    assert figures["history"][0] == before["history"][0]


def test_a_budget_that_is_too_short(encoder, tmp_path):
    lessons = options(tmp_path, layer_steps=None, steps=None, budget="0.01s")
    with pytest.raises(ValueError, match=r"budget=0 s is too short for .*Expected at least \d+s"):
        linearize_checkpoint(encoder, tmp_path / "lion", distillation=lessons)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "source", "train.txt"]


def test_a_slow_measurement_is_found_with_few_samples(encoder, tmp_path, monkeypatch):
    """And a budget that it leaves no time for is refused before the copy is measured."""
    sizes = []
    monkeypatch.setattr(HeldOut, "_seconds", lambda _, lesson, size: (sizes.append(size), size)[1])
    monkeypatch.setattr(stage.Learner, "measure_all", lambda *_: pytest.fail("was measured"))
    other = str(tmp_path / "other.txt")
    lessons = options(tmp_path, layer_steps=None, steps=None, budget="20s", validation_file=other)
    with pytest.raises(ValueError, match=r"too short .* and measuring 4\d.* least 4\ds"):
        linearize_checkpoint(encoder, tmp_path / "lion", distillation=lessons)
    assert sizes == [4, 4] and not (tmp_path / "lion.run").exists()


@pytest.mark.parametrize("text", ["5 minutes", "0", "-3", "m", "1.5.2s", ""])
def test_a_budget_that_is_no_time(text):
    with pytest.raises(ValueError, match="expected a time such as 90s, 30m"):
        Distillation(budget=text)


def test_a_budget_and_steps_are_one_too_many():
    with pytest.raises(ValueError, match="budget='30m' and steps=5: expected a budget, or numbers"):
        Distillation(budget="30m", steps=5)


def test_the_best_state_is_kept(encoder, tmp_path):
    """With a learning rate that spoils the copy, the result is the copy."""
    lessons = options(tmp_path, layer_steps=0, steps=12, learning_rate=3.0)
    made = linearize_checkpoint(encoder, tmp_path / "lion", distillation=lessons)
    assert made.metrics["cosine"] == made.metrics["copied_cosine"]


HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1], "a+b")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_in_use_is_refused(encoder, tmp_path):
    (tmp_path / "lion.run").mkdir()
    holder = run([sys.executable, "-c", HOLDER, str(tmp_path / "lion.run" / ".run.lock")])
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="lion.run is in use by"):
            linearize_checkpoint(encoder, tmp_path / "lion", distillation=options(tmp_path))
    finally:
        holder.kill()
        holder.communicate()
