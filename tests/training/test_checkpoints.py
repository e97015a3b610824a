"""Checkpoints are whole or not used, and a run goes on from the newest whole one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import model, text_config
from support.trainers import trainer
from transformers import TrainerCallback

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
    checkpoints.rotate(tmp_path, None)
    checkpoints.rotate(tmp_path, 2, keep=str(tmp_path / "checkpoint-5"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-15",
        "checkpoint-20",
        "checkpoint-5",
        "checkpoint-best",
    ]


def test_rotation_does_not_count_broken_checkpoints(tmp_path):
    for step in (5, 10, 20):
        fill(tmp_path / f"checkpoint-{step}")
    for step in (5, 10):
        checkpoints.seal(tmp_path / f"checkpoint-{step}")
    checkpoints.rotate(tmp_path, 1)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-20",
    ]


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
        match="attention_form='chunk' with attention_probs_dropout_prob=0.1: only 'attention'",
    ):
        trainer(
            tmp_path, network=model("SequenceClassification", text_config(attention_form="chunk"))
        )


FULL_DISK = """
import resource, sys
from support.trainers import trainer
from transformers import TrainerCallback
from pathlib import Path
run = trainer(Path(sys.argv[1]), max_steps=8)
class Full(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
run.add_callback(Full())
run.train()
"""


@pytest.mark.slow
def test_full_disk(tmp_path):
    folder, tests = tmp_path / "run", Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 1
    assert (
        "checkpoint-8 could not be written and was removed" in done.stderr
        and "Make room" in done.stderr
    )
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert checkpoints.damage(folder / "checkpoint-4") is None


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
