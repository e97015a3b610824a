"""A run that is killed again and again ends with the weights of one that is not."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=128"
SMALL += ",initializer_range=0.1"


def table(file: Path) -> list[dict[str, str]]:
    """The curves without times and speeds."""
    with file.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [
        {
            k: v
            for k, v in row.items()
            if not k.endswith(("second", "runtime", "mfu")) and k != "train_loss"
        }
        for row in rows
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "streaming"), [(10, False), (4, True)], ids=["rows", "stream"])
def test_kills(tmp_path, kills, streaming):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "validation.txt").write_text("\n".join(lines[-60:]), encoding="utf-8")
    prepare = [sys.executable, str(ROOT / "run_scripts/run_mlm.py")]
    argv = [
        "--train_file",
        "train.txt",
        "--validation_file",
        "validation.txt",
        "--model",
        str(ROOT / "configs/lion-s-base"),
    ]
    argv += [
        "--model_overrides",
        SMALL,
        "--max_length",
        "32",
        "--per_device_train_batch_size",
        "4",
        "--report_to",
        "none",
    ]
    argv += [
        "--use_cpu",
        "--disable_tqdm",
        "true",
        "--logging_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "20",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    options = {
        "cwd": tmp_path,
        "env": environment,
        "check": True,
        "text": True,
        "capture_output": True,
    }
    vocabulary = [
        "--train_tokenizer",
        "--vocab_size",
        "500",
        "--max_steps",
        "1",
        "--output_dir",
        "tokenizer",
    ]
    subprocess.run([*prepare, *argv, *vocabulary], **options)

    argv += [
        "--tokenizer",
        "tokenizer",
        "--max_steps",
        "45",
        "--save_steps",
        "3",
        "--learning_rate",
        "3e-3",
    ]
    argv += ["--streaming", "--shuffle_buffer", "50"] if streaming else []
    worker = [sys.executable, str(ROOT / "tests/support/killed_runs.py"), str(kills), "7"]
    done = subprocess.run([*worker, *argv, "--output_dir", "killed"], **options)
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == kills
    assert sum(not run["finished"] for run in report) > kills // 3, report  # most were really cut
    assert any(run["found"] for run in report), report
    killed, whole = tmp_path / "killed", tmp_path / "killed-whole"
    assert table(killed / "curves.csv") == table(whole / "curves.csv")
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list(killed.glob(".*"))  # nothing half-written is left, and no lock
