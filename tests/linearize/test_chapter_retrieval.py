"""benchmarks/chapter_retrieval.py: which document a query is found in."""

import argparse
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import SPECIAL_TOKENS
from support.softmax_models import softmax_model
from transformers import BertTokenizer

from lion_hf.linearize.checkpoint import linearize_checkpoint

pytest.importorskip("sentence_transformers")

FOLDER = Path(__file__).parents[2] / "benchmarks"
WORDS = [*"abcdefghijklmnop"]


@pytest.fixture
def chapters(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("chapter_retrieval")


@pytest.fixture
def files(tmp_path):
    """Three documents of 40 words, and a query from each half of each."""
    generator = np.random.default_rng(0)
    texts = [[str(word) for word in generator.choice(WORDS, 40)] for _ in range(3)]
    documents = [{"id": 10 + n, "text": " ".join(text)} for n, text in enumerate(texts)]
    queries = [
        {
            "text": " ".join(text[before : before + 8]),
            "document": 10 + n,
            "words_before": before,
            "document_words": 40,
        }
        for n, text in enumerate(texts)
        for before in (0, 30)
    ]
    for name, rows in (("documents", documents), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in rows))
    return argparse.Namespace(
        documents=tmp_path / "documents.jsonl",
        queries=tmp_path / "queries.jsonl",
        chapters=None,
        windows=None,
    )


def test_bm25_prefers_rare_words_and_short_documents(chapters):
    documents = ["the cat the cat", "the dog", "The dog, and much else of the kind", "the end"]
    scores = chapters.bm25(documents, ["Dog!", "the", "cat", "bird"])
    assert scores.argmax(1)[:1] == 1 and scores[0, 1] > scores[0, 2] > 0 == scores[0, 3]
    assert scores[2, 0] > scores[1].max() > 0 and scores[2, 1:].max() == 0
    assert not scores[3].any()


def test_the_best_window_counts(chapters):
    queries = np.eye(3)[:2]
    windows = [np.array([[0.0, 0.0, 5.0], [3.0, 0.0, 4.0]]), np.array([[0.0, 2.0, 0.0]])]
    np.testing.assert_allclose(chapters.best_window(queries, windows), [[0.6, 0.0], [0.0, 1.0]])
    assert [*chapters.hits(np.array([[0.6, 0.0], [0.0, 1.0]]), np.array([0, 0]))] == [True, False]


def test_halves_and_parts_of_the_documents(chapters, files):
    texts, queries, answers, early = chapters.load(files)
    assert [*answers] == [0, 0, 1, 1, 2, 2] and [*early] == [True, False] * 3
    assert all(query in texts[n] for query, n in zip(queries, answers))
    files.chapters = 2
    texts, _, answers, _ = chapters.load(files)
    assert len(texts) == 2 and [*answers] == [0, 0, 1, 1]


def test_two_folders(chapters, files, tmp_path):
    words = [*SPECIAL_TOKENS, *WORDS]
    softmax_model("BertModel", vocab_size=len(words)).save_pretrained(tmp_path / "model")
    BertTokenizer(
        vocab={word: n for n, word in enumerate(words)}, model_max_length=20
    ).save_pretrained(tmp_path / "model")
    linearize_checkpoint(tmp_path / "model", tmp_path / "copy", max_position_embeddings=50)
    files.source, files.copy = str(tmp_path / "model"), str(tmp_path / "copy")
    texts, queries, answers, early = chapters.load(files)
    scores = chapters.all_scores(files, texts, queries)
    single = [single for _, single in scores.values()]
    assert single == [False, True, True, False, True, True, False]
    assert all(np.isfinite(x).all() and x.shape == (6, 3) for x, _ in scores.values())
    files.windows = [8, 20]
    more = chapters.all_scores(files, texts, queries)
    assert len(more) == 11 and all(np.array_equal(more[x][0], scores[x][0]) for x in scores)
    model = chapters.SentenceTransformer(files.copy, device="cpu")
    whole, windows = chapters.read_whole(model, texts, [8, 20])
    ids = torch.tensor([model.tokenizer(texts[0])["input_ids"]])
    with torch.no_grad():
        states = model[0].auto_model(ids).last_hidden_state[0]
    assert ids.shape == (1, 42) and [len(x) for x in windows[20]] == [3, 3, 3]
    np.testing.assert_allclose(whole[0], states.mean(0), atol=1e-5)
    np.testing.assert_allclose(windows[20][0][1], states[19:37].mean(0), atol=1e-5)
    np.testing.assert_allclose(windows[8][0][2], states[13:19].mean(0), atol=1e-5)
    assert [len(x) for x in chapters.pieces(texts[0], model, 20)] == [18, 18, 4]
