"""Rows that processes share train as whole rows do, in the real command."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from support.launches import ROOT, TORCHRUN, start
from support.models import text_config
from torch.utils.data import BatchSampler, DataLoader

from lion_hf.data.rows import full_rows_of
from lion_hf.tasks import mlm
from lion_hf.tasks.mlm_model import check_pieces
from lion_hf.tasks.mlm_settings import DataSettings, ModelSettings, check_settings
from lion_hf.training.sequence_trainer import SequenceArguments, deal_to, piece_of

SCRIPT = str(ROOT / "run_scripts/run_mlm.py")
FOUR = ["4" if word == "2" else word for word in TORCHRUN]
SIZES = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=16"
OVERRIDES = f"{SIZES},initializer_range=0.3,hidden_dropout_prob=0,chunk_size=8"
LENGTH = 41  # no piece is as long as another


def options(folder: Path, output: str, *more: str) -> list[str]:
    argv = ["--train_file", str(folder / "text.txt"), "--validation_file", str(folder / "text.txt")]
    argv += ["--tokenizer", str(folder / "first"), "--rows", "blocks", "--max_length", str(LENGTH)]
    argv += ["--model_overrides", OVERRIDES, "--max_steps", "4", "--learning_rate", "1e-2"]
    argv += ["--total_batch_size", "4", "--logging_steps", "1", "--validation_rows", "5"]
    argv += ["--disable_tqdm", "true", "--report_to", "none", "--peak_tflops", "1"]
    return [*argv, "--output_dir", str(folder / output), *more]


def curves(folder: Path) -> list[float]:
    """All that a run logged: losses, gradients' norms, and the evaluation at its end."""
    with (folder / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    return [float(row[name]) for row in rows for name in ("loss", "grad_norm")] + [
        float(rows[-1]["eval_loss"])
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text and its tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    lines = (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()
    (folder / "text.txt").write_text("\n".join(lines[:150]), encoding="utf-8")
    mlm.main(
        ["--train_file", str(folder / "text.txt"), "--train_tokenizer", "--vocab_size", "200"]
        + ["--model_overrides", OVERRIDES, "--max_steps", "1", "--report_to", "none"]
        + ["--peak_tflops", "1", "--use_cpu", "true", "--output_dir", str(folder / "first")]
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, more",
    [
        ("modern-lion-s-tiny", ()),
        ("modern-lion-lit-tiny", ("--gradient_checkpointing", "true")),
        ("modern-lion-d-tiny", ("--streaming", "true", "--shuffle_buffer", "100")),
    ],
)
def test_shared_rows_train_as_whole_rows_do(folder, preset, more, monkeypatch):
    """Four processes, two for each row; of a stream two, because readers divide it."""
    model, size = ("--model", preset, *more), ("--sequence_parallel_size", "2")
    one = folder / f"one-{preset}"
    monkeypatch.setattr(mlm, "make_rows_of", full_rows_of)  # as for rows that are shared
    mlm.main(
        options(folder, one.name, *model, "--per_device_train_batch_size", "4")
        + ["--use_cpu", "true"]
    )
    stream = "--streaming" in more
    batch = ("--per_device_train_batch_size", "4" if stream else "2")
    saved = ("--save_strategy", "steps", "--save_steps", "2")
    shared = options(folder, f"shared-{preset}", *model, *size, *batch, *saved)
    start([TORCHRUN if stream else FOUR], SCRIPT, *shared)
    output = folder / f"shared-{preset}"
    assert curves(output) == pytest.approx(curves(one), rel=1e-3)
    if preset == "modern-lion-s-tiny":  # from the middle, with the rows that are due then
        before, kept = curves(output), output / "checkpoint-2" / "trainer_state.json"
        shutil.rmtree(output / "checkpoint-4")
        written = kept.stat().st_mtime_ns
        start([FOUR], SCRIPT, *shared)
        assert (output / "checkpoint-4").is_dir() and kept.stat().st_mtime_ns == written
        assert curves(output) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--sequence_parallel_size", "2"], "sequence_parallel_size=2: .* processes, which is 1"),
        (["--sequence_parallel_size", "0"], "sequence_parallel_size=0: .* at least 1"),
    ],
)
def test_impossible_sizes(tmp_path, settings, message, capsys):
    batch = ("--per_device_train_batch_size", "4", "--use_cpu", "true")
    with pytest.raises(SystemExit) as stopped:
        mlm.main(options(tmp_path, "none", *batch, *settings))
    assert re.search(message, f"{stopped.value} {capsys.readouterr().err}")
    assert not (tmp_path / "none").exists()


def test_rows_with_padding_are_not_shared(tmp_path):
    arguments = SequenceArguments(str(tmp_path / "none"), use_cpu=True, report_to="none")
    arguments.sequence_parallel_size = 2
    data = DataSettings(train_file=["text.txt"], rows="packed")
    with pytest.raises(ValueError, match="size 2 with --rows packed: expected --rows blocks"):
        check_settings(ModelSettings(), data, arguments)
    config = text_config(conv_kernel_size=5)
    with pytest.raises(ValueError, match="size 8 with --max_length 15: .* at least 16 tokens"):
        check_pieces(config, 15, 8)
    check_pieces(config, 16, 8)


def test_only_full_rows_are_shared():
    class Words:
        cls_token_id, sep_token_id, is_fast = 0, 1, False

        def __call__(self, documents, **kwargs):
            return {"input_ids": [[2] * len(x) for x in documents]}

    rows = full_rows_of(["a" * 8, "b" * 7], Words(), "blocks", 6)
    assert [len(row["input_ids"]) for row in rows] == [6, 6, 6]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_pieces_of_a_batch(count):
    batch = {"input_ids": torch.arange(14).view(2, 7), "place": (3, 1)}
    pieces = [piece_of(batch, rank, count) for rank in range(count)]
    assert all(piece["place"] == (3, 1) for piece in pieces)
    for name, whole in (("input_ids", batch["input_ids"]), ("position_ids", torch.arange(7))):
        joined = torch.cat([piece[name] for piece in pieces], dim=1)
        assert torch.equal(joined, whole.expand(2, 7))


def test_batches_that_are_not_dealt_out_are_not_shared():
    """Batches of a reader go to all of its processes; those that one process sends cannot."""
    batches = BatchSampler(range(12), batch_size=2, drop_last=True)
    loader = DataLoader(range(12), batch_sampler=BatchSamplerShard(batches, 4, 3))
    deal_to(loader, 1, 2)
    assert [batch.tolist() for batch in loader] == [[2, 3], [6, 7], [10, 11]]
    with pytest.raises(ValueError, match="expected a training set with a length, and no dispatch"):
        deal_to(DataLoader(range(12), batch_sampler=batches), 1, 2)
