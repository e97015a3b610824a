"""`lion-hf linearize` in two processes: they learn what one learns with the whole batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launches import LAUNCHES, start
from support.softmax_models import softmax_model
from transformers import BertTokenizer

from lion_hf.cli import main

KILLED = """
import os, signal, sys
from lion_hf.cli import main
from lion_hf.linearize import stage
stage.SAVE_SECONDS = 0.0
last, own, steps = int(sys.argv[1]), stage.Learner._step, []
def step(*args):
    steps.append(1)
    if len(steps) == last and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return own(*args)
stage.Learner._step = step
sys.exit(main(sys.argv[2:]))
"""  # the command, which saves its state before each step, until a kill in the given one

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


def make_source(folder: Path, lines: list[str], **config: int) -> None:
    """A random BERT with its tokenizer, and text beside it."""
    softmax_model("BertModel", vocab_size=len(WORDS), **config).save_pretrained(folder / "source")
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)})
    tokenizer.save_pretrained(folder / "source")
    (folder / "two.txt").write_text("\n".join(lines))


def command(folder: Path, output: str, *more: str) -> list[str]:
    files = ["--train_file", str(folder / "two.txt"), "--validation_file", str(folder / "two.txt")]
    steps = ["--layer_steps", "0", "--steps", "4", "--learning_rate", "1e-3"]
    return ["linearize", str(folder / "source"), str(folder / output), *files, *steps, *more]


def distance(first: Path, second: Path) -> float:
    """The mean difference of two models' weights."""
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    count = sum(x.numel() for x in one.values())
    return sum((x - two[name]).abs().sum().item() for name, x in one.items()) / count


@pytest.mark.slow
def test_two_processes_learn_as_one_with_the_whole_batch(tmp_path):
    """Each process has one of two texts of equal length, so the mean gradient is that of both."""
    make_source(tmp_path, ["a b c d e f", "h g h g a a"])
    start(LAUNCHES["torchrun"][0], "-m", "lion_hf", *command(tmp_path, "two", "--batch_size", "1"))
    assert main(command(tmp_path, "one", "--batch_size", "2")) == 0
    assert main(command(tmp_path, "half", "--batch_size", "1")) == 0
    # in bfloat16, which the run may choose, sums depend on the batch
    one, two, half = (tmp_path / name for name in ("one", "two", "half"))
    assert distance(one, two) < 0.25 * distance(one, half)
    figures = [json.loads((folder / "linearize.json").read_text()) for folder in (one, two)]
    cosines = [found["metrics"]["cosine"] for found in figures]
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir() if ".run" in path.name) == []


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill(tmp_path):
    """In the stage of long documents, when they are at different places of their batches."""
    lines = [" ".join("abcdefgh"[k * n % 8] for n in range(2 + 7 * k % 55)) for k in range(1, 121)]
    make_source(tmp_path, lines, max_position_embeddings=64)
    (tmp_path / "killed.py").write_text(KILLED)
    more = ["--max_position_embeddings", "300", "--document_steps", "10", "--bf16"]

    def run(last: int, output: str) -> str:
        program = [str(tmp_path / "killed.py"), str(last), *command(tmp_path, output, *more)]
        return start(LAUNCHES["torchrun"][0], *program)[0]

    run(100, "whole")
    with pytest.raises(AssertionError, match="SIGKILL"):
        run(12, "lion")  # the eighth step on documents
    (checkpoint,) = (tmp_path / "lion.run").glob("checkpoint-*")
    places = torch.load(checkpoint / "state.pt", weights_only=True)["state"]["places"]
    assert len({*places}) == 2 and not (tmp_path / "lion").exists()
    assert "going on after" in run(5, "lion")  # three steps are left
    assert distance(tmp_path / "whole", tmp_path / "lion") == 0
    assert not (tmp_path / "lion.run").exists()
