"""`lion-hf linearize` in two processes: they learn what one learns with the whole batch."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.launches import LAUNCHES, start
from support.softmax_models import softmax_model
from transformers import BertTokenizer

from lion_hf.cli import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


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
    softmax_model("BertModel", vocab_size=len(WORDS)).save_pretrained(tmp_path / "source")
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)})
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "two.txt").write_text("a b c d e f\nh g h g a a\n")
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
