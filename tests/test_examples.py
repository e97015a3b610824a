"""The examples run as they are, without a network, and with a model of the user's."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image
from support.models import image_config
from support.pages import ROOT

from lion_hf import LionForImageClassification

EXAMPLES = {  # what each prints last
    "embed_long_documents": r"lighthouse: -?[01]\.\d{3}\nbakery: -?[01]\.\d{3}\n",
    "fine_tune_classifier": r"held-out accuracy: (9\d|100)%\n",
    "search_a_book": r"[\d,]+ tokens, \d+ passages\. .+\n(-?0\.\d\d: .+ \.\.\.\n){3}",
    "serve_with_onnx": r"-?[01]\.\d{3} The train was late\.\n-?[01]\.\d{3} He closed .+\n",
    "classify_any_size": r"224 x 224 pixels, 14 x 14 .+%\)\n640 x 360 pixels, 23 x 40 .+%\)\n",
}


def run(name: str, folder, *words: str) -> str:
    """What an example prints that is started in a folder."""
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "DeprecationWarning" not in result.stderr and "FutureWarning" not in result.stderr
    return result.stdout


def test_all_examples_are_here():
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_can_be_read_whole(name):
    assert 20 <= (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").count("\n") <= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    assert re.search(EXAMPLES[name] + r"\Z", run(name, tmp_path))


@pytest.mark.slow
def test_an_example_takes_a_model_of_yours(tmp_path):
    config = image_config(num_labels=2, id2label={0: "cat", 1: "dog"})
    LionForImageClassification(config).save_pretrained(tmp_path / "model")
    Image.new("RGB", (50, 30)).save(tmp_path / "picture.png")
    shown = run("classify_any_size", tmp_path, "model", "picture.png")
    assert re.fullmatch(r"50 x 30 pixels, 8 x 13 patches: (cat|dog) \(\d+%\)\n", shown)


@pytest.mark.slow
@pytest.mark.parametrize("words,passages", [(5, 1), (99, 1), (250, 3)])
def test_a_short_book_has_few_passages(tmp_path, words, passages):
    """With 99 words and [CLS], the second window holds only [SEP]."""
    text = " ".join((["river", "state", "law"] * 99)[:words])
    (tmp_path / "book.txt").write_text(text)
    shown = run("search_a_book", tmp_path, "", "book.txt")
    assert shown.count("\n") == 1 + passages and f" {passages} passages" in shown


@pytest.mark.slow
def test_an_empty_book(tmp_path):
    (tmp_path / "book.txt").write_text("\n")
    with pytest.raises(AssertionError, match="BOOK book.txt holds no text"):
        run("search_a_book", tmp_path, "", "book.txt")
