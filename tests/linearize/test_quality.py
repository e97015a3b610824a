"""benchmarks/linearize_quality.py: the figures that compare a copy with its source."""

import argparse
import csv
import importlib
from pathlib import Path

import numpy as np
import pytest
from support.models import SPECIAL_TOKENS
from support.softmax_models import softmax_model
from transformers import BertTokenizer

pytest.importorskip("sentence_transformers")
pytest.importorskip("sklearn")

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("linearize_quality")


def embeddings(count: int = 60, size: int = 16):
    return np.random.default_rng(0).normal(size=(count, size))


def test_equal_embeddings_have_the_best_figures(quality):
    x = embeddings()
    assert quality.cosines(x, 3 * x) == pytest.approx(1)
    assert quality.rank_correlation(x, 3 * x) == pytest.approx(1)
    assert quality.retrieval(x, x + 1e-3) == 100


def test_other_embeddings_do_not(quality):
    x, y = embeddings(), embeddings()[::-1]
    assert abs(quality.cosines(x, y)) < 0.2
    assert abs(quality.rank_correlation(x, y)) < 0.2
    assert quality.retrieval(x, y) < 10
    assert quality.retrieval(x, np.concatenate([x[:30], y[30:]])) == pytest.approx(50, abs=5)


def test_the_probe_reads_what_is_linear(quality):
    x = embeddings(200)
    labels = [str(int(value > 0)) for value in x[:, 0]]
    assert quality.probe(x[:150], labels[:150], x[150:], labels[150:]) > 90
    constant = np.ones_like(x)
    assert quality.probe(constant[:150], labels[:150], constant[150:], labels[150:]) < 70


def test_two_folders(quality, tmp_path):
    """A source beside itself, with tables whose unrelated pairs do not count."""
    words = [*SPECIAL_TOKENS, *"abcdefghijklmnop"]
    softmax_model("BertModel", vocab_size=len(words)).save_pretrained(tmp_path / "model")
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(
        tmp_path / "model"
    )
    rows = [(f"{x} {y}", f"{y} {x}", n % 2) for n, (x, y) in enumerate(zip(words[5:], words[6:]))]
    files = {}
    for name, columns in (
        ("pairs", ("sentence1", "sentence2", "label")),
        ("texts", ("sentence", "other", "label")),
    ):
        files[name] = str(tmp_path / f"{name}.csv")
        with open(files[name], "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    files = argparse.Namespace(**files, train=files["texts"], device="cpu")
    model = str(tmp_path / "model")
    figures = quality.measure((model, model), files)
    assert figures["source"] == figures["copy"]
    assert all(value == pytest.approx(1) for value in figures["between"].values())
    assert "| cosine of texts | 1 | 1.000 |" in quality.table(figures)
    files.pairs = files.texts
    with pytest.raises(SystemExit, match="no columns"):
        quality.measure((model, model), files)
