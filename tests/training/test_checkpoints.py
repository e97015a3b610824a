"""Checkpoints are whole or not used, and a run goes on from the newest whole one."""

import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import model, text_config
from support.trainers import Rows, trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainerCallback

from lion_hf import LionTrainer
from lion_hf.data.samples import SeededDataset, SkippedSample, sample_seed, seeded
from lion_hf.training import checkpoints
from lion_hf.training.speed import items_and_flops, matmul_rate


def fill(folder: Path, text: str = "content") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    (folder / "part").mkdir()
    (folder / "part" / "state.json").write_text("{}")
    return folder


DAMAGES = {
    "missing file": (lambda f: (f / "part" / "state.json").unlink(), "state.json is missing"),
    "cut file": (
        lambda f: (f / "model.safetensors").write_text("con"),
        "model.safetensors has 3 bytes: expected 7",
    ),
    "changed file": (
        lambda f: (f / "model.safetensors").write_text("Content"),
        "content of model.safetensors has changed",
    ),
    "no manifest": (lambda f: (f / checkpoints.MANIFEST).unlink(), "ended while it was written"),
    "cut manifest": (
        lambda f: (f / checkpoints.MANIFEST).write_text('{"mod'),
        "manifest.json cannot be read",
    ),
    "other manifest": (
        lambda f: (f / checkpoints.MANIFEST).write_text('{"model.safetensors": 7}'),
        "manifest.json cannot be read",
    ),
    "deep manifest": (
        lambda f: (f / checkpoints.MANIFEST).write_text("[" * 100_000),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_is_used(tmp_path, kind, caplog):
    older, newer = fill(tmp_path / "checkpoint-9"), fill(tmp_path / "checkpoint-10")
    for folder in (older, newer):
        checkpoints.seal(folder)
        assert checkpoints.damage(folder) is None
    assert checkpoints.find_checkpoint(tmp_path) == newer  # by number, not by name
    break_it, message = DAMAGES[kind]
    break_it(newer)
    assert message in checkpoints.damage(newer)
    assert checkpoints.find_checkpoint(tmp_path) == older
    assert "checkpoint-10 is broken and left alone" in caplog.text and message in caplog.text
    with pytest.raises(
        ValueError, match="resume='.*checkpoint-10': .*expected 'auto', 'never' or a whole"
    ):
        checkpoints.find_checkpoint(tmp_path, str(newer))
    assert checkpoints.find_checkpoint(tmp_path, str(older)) == older


def test_an_older_checkpoint_is_not_mixed_with_newer_ones(tmp_path):
    for step in (9, 10):
        checkpoints.seal(fill(tmp_path / f"checkpoint-{step}"))
    assert (
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-10")).name
        == "checkpoint-10"
    )
    with pytest.raises(ValueError, match="holds checkpoint-10 of another continuation"):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-9"))
    other = fill(tmp_path / "other" / "checkpoint-20")
    checkpoints.seal(other)
    assert checkpoints.find_checkpoint(tmp_path / "new", str(other)) == other
    with pytest.raises(ValueError, match="holds checkpoint-9, checkpoint-10 of"):
        checkpoints.find_checkpoint(tmp_path, str(other))


def test_never_does_not_overwrite(tmp_path):
    assert checkpoints.find_checkpoint(tmp_path, "never") is None
    assert checkpoints.find_checkpoint(tmp_path / "nowhere", "auto") is None
    fill(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="holds checkpoint-3: choose another output_dir"):
        checkpoints.find_checkpoint(tmp_path, "never")
    with pytest.raises(ValueError, match="there is no such folder"):
        checkpoints.find_checkpoint(tmp_path, "atuo")


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (5, 10, 15, 20):
        checkpoints.seal(fill(tmp_path / f"checkpoint-{step}"))
    (tmp_path / "checkpoint-best").mkdir()
    newest = tmp_path / "checkpoint-20"
    checkpoints.rotate(newest, None)
    checkpoints.rotate(newest, 2, keep=str(tmp_path / "checkpoint-5"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-15",
        "checkpoint-20",
        "checkpoint-5",
        "checkpoint-best",
    ]


def test_rotation_keeps_a_new_run_beside_an_old_one(tmp_path):
    for step in (2, 4, 8):  # 4 and 8 are there from an earlier run
        checkpoints.seal(fill(tmp_path / f"checkpoint-{step}"))
    checkpoints.begin(tmp_path / "checkpoint-9")  # which was killed
    checkpoints.rotate(tmp_path / "checkpoint-2", 2)
    left = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert left == ["checkpoint-2", "checkpoint-8", "checkpoint-9"]
    checkpoints.rotate(tmp_path / "checkpoint-2", 1)
    left = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert left == ["checkpoint-2", "checkpoint-9"]


def test_rotation_does_not_count_broken_checkpoints(tmp_path):
    for step in (4, 5, 10, 20):
        checkpoints.begin(tmp_path / f"checkpoint-{step}")
    for step in (5, 10):
        checkpoints.seal(tmp_path / f"checkpoint-{step}")
    checkpoints.rotate(tmp_path / "checkpoint-10", 1)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-20",
    ]


# What the run did not write


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_others_wrote_is_not_deleted(tmp_path):
    """Foreign folders and links that are named like checkpoints survive training and rotation."""
    run, far = tmp_path / "run", tmp_path / "far"
    fill(run / "checkpoint-1", "somebody's")
    fill(run / "checkpoint-8", "somebody's")
    (run / "checkpoint-1" / checkpoints.MANIFEST).write_text('{"name": "an app"}')
    moved = fill(far / "checkpoint-2")
    checkpoints.seal(moved)
    (run / "checkpoint-2").symlink_to(moved)
    (run / "checkpoint-3").symlink_to(far / "nothing")
    (run / "checkpoint-4").write_text("a file")
    (run / "checkpoint-\u00b2").mkdir()
    trainer(run, save_total_limit=1, save_steps=2).train()
    assert checkpoints.damage(moved) is None
    assert checkpoints.damage(run / "checkpoint-12") is None
    assert entries(run) == [
        "checkpoint-1",
        "checkpoint-12",
        "checkpoint-2.other",
        "checkpoint-3",
        "checkpoint-4.other",
        "checkpoint-8.other",
        "checkpoint-\u00b2",
    ]
    assert (run / "checkpoint-2.other").resolve() == moved
    assert (run / "checkpoint-4.other").read_text() == "a file"
    for name in ("checkpoint-1", "checkpoint-8.other"):
        assert (run / name / "model.safetensors").read_text() == "somebody's"


def test_a_symbolic_link_is_continued_from_and_left_alone(tmp_path):
    run = tmp_path / "run"
    trainer(run, max_steps=4).train()
    moved = (run / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    (run / "checkpoint-4").symlink_to(moved)
    assert checkpoints.find_checkpoint(run) == run / "checkpoint-4"
    again = trainer(run, save_total_limit=1)
    again.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert entries(run) == ["checkpoint-12", "checkpoint-4"]
    assert checkpoints.damage(run / "checkpoint-4") is None
    assert not checkpoints.remove(run / "checkpoint-4") and (moved / "model.safetensors").exists()


def test_a_best_checkpoint_does_not_cost_others(tmp_path):
    """With save_total_limit=1 Trainer deletes, in the end, whatever is named like a checkpoint."""
    fill(tmp_path / "checkpoint-1", "somebody's")
    made = trainer(
        tmp_path,
        save_total_limit=1,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=4,
        metric_for_best_model="eval_runtime",
        greater_is_better=False,
        eval_dataset=Rows(),
    )
    made.train()
    assert "checkpoint-1" in entries(tmp_path) and "checkpoint-12" in entries(tmp_path)


def test_removal_that_is_interrupted_can_go_on(tmp_path, monkeypatch):
    folder = fill(tmp_path / "checkpoint-5")
    checkpoints.seal(folder)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints.shutil, "rmtree", stop)
        checkpoints.remove(folder)
    assert checkpoints.damage(folder) and checkpoints.is_own(folder)
    checkpoints.begin(folder)
    assert entries(folder) == [checkpoints.UNSEALED]
    (folder / "weights").write_text("new")
    checkpoints.seal(folder)
    assert entries(folder) == [checkpoints.MANIFEST, "weights"]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1e400, 0]}',
        '{"a": [1, 2, 3]}',
        '{"a": null}',
        "[]",
        "null",
        "\x00",
        '{"a": [[], 0]}',
    ],
)
def test_a_manifest_that_is_none(tmp_path, text):
    folder = fill(tmp_path / "checkpoint-5")
    (folder / checkpoints.MANIFEST).write_text(text)
    assert "manifest.json cannot be read" in (checkpoints.damage(folder) or "") or text == "[]"
    assert checkpoints.find_checkpoint(tmp_path) is None


# Training


def losses(run: LionTrainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


@pytest.mark.slow
@pytest.mark.parametrize("cut", [4, 8], ids=["within an epoch", "between epochs"])
def test_a_continued_run_has_the_losses_of_an_unbroken_one(tmp_path, cut):
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "whole")] == [
        "checkpoint-8",
        "checkpoint-12",
    ]
    first = trainer(tmp_path / "cut")
    first.add_callback(StopAt(cut + 2))
    first.train()
    second = trainer(tmp_path / "cut")
    torch.rand(3)  # another random state
    second.train(resume_from_checkpoint=str(checkpoints.find_checkpoint(tmp_path / "cut")))
    assert losses(second) == losses(whole)
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), name


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path):
    network = model("SequenceClassification", text_config())
    run = trainer(tmp_path, network=network, save_steps=2)

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                with torch.no_grad():
                    network.lion.layers[1].mlp.fc1.weight[0, 0] = float("nan")

    run.add_callback(Break())
    with pytest.raises(
        FloatingPointError,
        match=r"in step 6 .*1 parameters are not finite, first lion.layers.1.mlp.fc1",
    ):
        run.train()
    assert checkpoints.find_checkpoint(tmp_path).name == "checkpoint-4"

    network = model("SequenceClassification", text_config())
    network.lion.layers[0].attention.v_proj.weight.data.fill_(3e38)
    with pytest.raises(
        FloatingPointError,
        match="first output that is not finite is that of lion.layers.0.attention.v_proj",
    ):
        trainer(tmp_path / "other", network=network).train()


def test_dropout_of_scores_needs_them(tmp_path):
    with pytest.raises(
        ValueError,
        match="attention_probs_dropout_prob=0.1 with attention_form='chunk': this form stores no",
    ):
        config = text_config(attention_form="chunk", attention_probs_dropout_prob=0.1)
        trainer(tmp_path, network=model("SequenceClassification", config))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob=0.1 drops scores"),
        ({"attention_form": "attention"}, "attention_form='attention' trains in the attention"),
        ({}, None),
        ({"attention_form": "chunk"}, None),
    ],
)
def test_a_run_in_quadratic_time_says_so_once(tmp_path, caplog, fields, message):
    network = model("SequenceClassification", text_config(**fields))
    trainer(tmp_path, network=network, max_steps=3).train()
    messages = [record.message for record in caplog.records]
    found = [message for message in messages if "square of the length" in message]
    assert len(found) == (message is not None)
    assert not found or found[0].startswith(message)


def small_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer written in Rust, with files of its own in a checkpoint."""
    words = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *(f"w{n}" for n in range(90))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def train_with_a_limit(folder: Path, limit: int) -> str:
    """Trains in a forked process in which no file can grow beyond a limit after step 5.

    Returns:
        The error that ended it, or nothing.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = sys.stderr = io.StringIO()  # pytest's are files too
            made = trainer(folder, max_steps=8, logging_steps=100)
            made.processing_class = small_tokenizer()
            made.add_callback(Full(limit))
            made.train()
        except BaseException as error:
            os.write(writer, repr(error).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        error = pipe.read()
    os.waitpid(pid, 0)
    return error


class Full(TrainerCallback):
    def __init__(self, limit: int):
        self.limit = limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


@pytest.mark.slow
def test_no_file_of_a_checkpoint_stays_half_written(tmp_path):
    """In a fresh process: no fork can train after one in which autograd has had threads."""
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r};"
        f" import pathlib, test_checkpoints as t; t.fill_the_disk(pathlib.Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "whole" / "checkpoint-8").is_dir()


def fill_the_disk(tmp_path: Path) -> None:
    """For each file of a checkpoint, the disk is full in its middle and before its last byte."""
    assert train_with_a_limit(tmp_path / "whole", 1 << 30) == ""
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    assert {"tokenizer.json", "model.safetensors", "optimizer.pt", "manifest.json"} <= set(sizes)
    for level in sorted({n for size in sizes.values() for n in (size - 1, size // 2)}):
        folder = tmp_path / str(level)
        error = train_with_a_limit(folder, level)
        assert error.startswith("OSError") and "Make room" in error, (level, error)
        assert "checkpoint-8 could not be written and was removed" in error
        assert [path.name for path in folder.iterdir()] == ["checkpoint-4"], level
        assert checkpoints.damage(folder / "checkpoint-4") is None, level
        shutil.rmtree(folder)


def test_the_mean_loss_is_that_of_all_steps(tmp_path):
    run = trainer(tmp_path, save_strategy="no", max_steps=5, logging_steps=3)
    mean = run.train().metrics["train_loss"]
    entries = losses(run)
    assert list(entries) == [3, 5] and mean == pytest.approx((3 * entries[3] + 2 * entries[5]) / 5)


def test_speed_is_logged(tmp_path):
    run = trainer(tmp_path, peak_tflops=1e-3, save_strategy="no", max_steps=6)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    for entry in entries:  # 5 rows of 9 tokens a step
        _, flops = items_and_flops(run.model, {"input_ids": torch.zeros(5, 9, dtype=torch.long)})
        assert entry["mfu"] == pytest.approx(
            entry["tokens_per_second"] / 45 * flops / 1e9, rel=1e-6
        )
    assert matmul_rate(torch.device("cpu"), torch.float32, size=64, seconds=0.01) > 1e6


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_model_flops(head):
    """Against torch's own count of a forward pass, whose scores are the only difference."""
    from torch.utils.flop_counter import FlopCounterMode

    config = text_config(
        attention_form="attention", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    network, ids = model(head, config), torch.randint(5, 99, (2, 11))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(input_ids=ids)
    tokens, flops = items_and_flops(network, {"input_ids": ids})
    assert tokens == 22
    mixing = 2 * 3 * 2 * 11 * min(4 * 11 * 8, 8 * 8**2)  # layers, heads, rows, tokens
    scores = 2 * 3 * 2 * 11 * 4 * 11 * 8
    pooled = (
        0 if head == "MaskedLM" else 2 * 20 * (24 * 24 + 24 * 3)
    )  # counted for all tokens, computed for the first ones
    assert flops / 3 - mixing - pooled == counter.get_total_flops() - scores
    mask = torch.ones(2, 11)
    mask[0, 5:] = 0
    assert items_and_flops(network, {"input_ids": ids, "attention_mask": mask})[0] == 16


def test_sparse_prediction_counts_the_labelled_tokens():
    dense, sparse = (
        model("MaskedLM", text_config(sparse_prediction=sparse)) for sparse in (False, True)
    )
    ids = torch.randint(5, 99, (2, 11))
    labels = torch.where(torch.arange(11) < 3, ids, -100)
    counts = [
        items_and_flops(network, {"input_ids": ids, "labels": labels})[1]
        for network in (dense, sparse)
    ]
    assert counts[0] - counts[1] == pytest.approx(3 * 2 * 99 * 24 * (22 - 6))


# Samples


def draw(sample: int) -> dict:
    return {"x": [sample, random.random(), np.random.rand(), torch.rand(()).item()]}


def test_samples_depend_on_seed_epoch_and_index_alone():
    data = SeededDataset(range(10), draw, seed=3)
    first = [data[index] for index in range(10)]
    torch.rand(5)
    before = torch.get_rng_state()
    assert [data[index] for index in reversed(range(10))] == first[::-1]
    assert torch.equal(before, torch.get_rng_state())
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
    assert list(loader) == first
    assert len({tuple(sample["x"][1:]) for sample in first}) == 10
    data.set_epoch(1)
    assert all(
        a["x"][1:] != b["x"][1:] for a, b in zip(first, (data[index] for index in range(10)))
    )
    assert SeededDataset(range(10), draw, seed=4)[0] != first[0]
    fixed = SeededDataset(range(10), draw, seed=3, vary=False)
    fixed.set_epoch(7)
    assert [fixed[index] for index in range(10)] == first


def test_repeats():
    data = SeededDataset(range(4), draw, repeats=3)
    assert len(data) == 12
    assert [data[index]["x"][0] for index in range(12)] == [0, 1, 2, 3] * 3
    assert len({data[index]["x"][1] for index in (1, 5, 9)}) == 3


def picky(sample: int) -> dict:
    if sample in (2, 3):
        raise SkippedSample(f"{sample} is no good")
    return {"x": sample}


def test_unusable_samples_are_named_counted_and_replaced(caplog):
    data = SeededDataset(range(5), picky)
    assert [data[index]["x"] for index in range(5)] == [0, 1, 4, 4, 4]
    assert data.skipped == 3
    assert "sample 2 is skipped: 2 is no good" in caplog.text
    list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=1))
    assert data.skipped == 6  # in the worker too
    with pytest.raises(ValueError, match="100 samples in a row, from number 0, cannot be used"):
        SeededDataset([2] * 200, picky)[0]
    with pytest.raises(ValueError, match="no samples"):
        SeededDataset([])


def test_seeds():
    assert sample_seed(1, 2) != sample_seed(2, 1) and 0 <= sample_seed(-1, 10**12) < 2**63
    with seeded(5):
        a = torch.rand(3)
    with seeded(5):
        b = torch.rand(3)
    assert torch.equal(a, b)


def test_manifest_is_json(tmp_path):
    checkpoints.seal(fill(tmp_path / "checkpoint-1"))
    manifest = json.loads((tmp_path / "checkpoint-1" / checkpoints.MANIFEST).read_text())
    assert (
        set(manifest) == {"model.safetensors", "part/state.json"}
        and manifest["part/state.json"][0] == 2
    )
