"""How well a linearized sentence encoder finds the chapter that a verse comes from.

    python benchmarks/chapter_retrieval.py SOURCE COPY --documents chapters/documents.jsonl \\
        --queries chapters/queries.jsonl [--chapters 200] [--windows 66 256]

SOURCE and COPY are folders of sentence-transformers. The copy needs positions for whole documents
(`lion-hf linearize --max_position_embeddings`). Documents are lines of JSON with `id` and `text`;
queries have `text`, `document`, and how far into it they are: `words_before` of `document_words`.
The table shows which share of the queries has its own document first, for queries from the first
and from the second half of a document.

The source reads windows of a document, each on its own: of as many tokens as it takes, or as
`--windows` says, two special ones included. The first one of as many as it takes is all that it
sees of a document that is cut off. The copy reads each document in one pass of `encode_long`, which
gives the mean over the document, and over each of these windows.
"""

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from lion_hf.data.samples import spread_evenly
from lion_hf.linearize import distillation  # noqa: F401 - LION is registered

K1, B = 1.2, 0.75  # of BM25: how soon repetition stops counting, and how much length does
HEAD = "| | one vector per document | first half (%) | second half (%) | all (%) |"
Embedded = tuple[np.ndarray, dict[int, list[np.ndarray]]]


def words(text: str) -> list[str]:
    """The words that BM25 counts."""
    return re.findall(r"\w+", text.lower())


def bm25(documents: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """The scores of documents for queries, (queries, documents), by Okapi BM25."""
    counts = [Counter(words(text)) for text in documents]
    lengths = np.array([sum(count.values()) for count in counts], dtype=float)
    saturation = K1 * (1 - B + B * lengths / lengths.mean())
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for place, count in enumerate(counts):
        for word, times in count.items():
            found[word].append((place, times))
    scores = np.zeros((len(queries), len(documents)))
    for row, query in zip(scores, queries):
        for word in words(query):
            if word in found:
                places, times = np.array(found[word]).T
                rarity = math.log(1 + (len(counts) - len(places) + 0.5) / (len(places) + 0.5))
                row[places] += rarity * times * (K1 + 1) / (times + saturation[places])
    return scores


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings of length one, (..., D)."""
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def best_window(queries: np.ndarray, windows: Sequence[np.ndarray]) -> np.ndarray:
    """The cosine of each query with the nearest window of each document, (queries, documents).

    Args:
        queries: (N, D).
        windows: per document (windows, D).
    """
    return np.stack([(unit(queries) @ unit(x).T).max(1) for x in windows], axis=1)


def pieces(text: str, model: SentenceTransformer, size: int) -> list[list[int]]:
    """The ids of a text in windows of `size` tokens, less two special ones that are left out."""
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[start : start + size - 2] for start in range(0, len(ids), size - 2)]


@torch.no_grad()
def read_windows(model: SentenceTransformer, texts: Sequence[str], size: int) -> list[np.ndarray]:
    """The mean states of each window of each text, read on its own: (windows, D) per text."""
    encoder, found = model[0].auto_model, []
    first, last = model.tokenizer.cls_token_id, model.tokenizer.sep_token_id
    for text in texts:
        windows = [torch.tensor([[first, *ids, last]]) for ids in pieces(text, model, size)]
        means = [encoder(ids).last_hidden_state[0].mean(0) for ids in windows]
        found.append(torch.stack(means).numpy())
    return found


def read_whole(model: SentenceTransformer, texts: Sequence[str], sizes: Sequence[int]) -> Embedded:
    """The mean states of each text, (texts, D), and of its windows, in one pass.

    Windows are (windows, D) per text, for each size. They have the tokens of the windows that a
    model for so many tokens reads: two of its tokens are special.
    """
    encoder, wholes = model[0].auto_model, []
    windows: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
    for text in texts:
        ids = model.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        end = len(ids) - 1
        starts = {size: range(1, end, size - 2) for size in sizes}
        spans = [(x, min(x + size - 2, end)) for size in sizes for x in starts[size]]
        output = encoder.encode_long(ids, spans=spans, progress=False)
        wholes.append(output.pooled[0].numpy())
        found = output.span_embeddings[0].split([len(starts[size]) for size in sizes])
        for size, means in zip(sizes, found):
            windows[size].append(means.numpy())
    return np.stack(wholes), windows


def hits(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Whether the own document of each query has the highest score, from (queries, documents)."""
    return scores.argmax(1) == answers


def load(options: argparse.Namespace) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Documents, queries, each query's document, and whether it is in the first half of it."""
    documents, queries = (
        [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
        for file in (options.documents, options.queries)
    )
    if options.chapters:
        places = spread_evenly(len(documents), min(options.chapters, len(documents)))
        documents = [documents[place] for place in places]
    place_of = {entry["id"]: place for place, entry in enumerate(documents)}
    queries = [entry for entry in queries if entry["document"] in place_of]
    answers = np.array([place_of[entry["document"]] for entry in queries])
    early = np.array([2 * x["words_before"] < x["document_words"] for x in queries])
    return [x["text"] for x in documents], [x["text"] for x in queries], answers, early


def all_scores(options: argparse.Namespace, texts: list[str], queries: list[str]) -> dict:
    """Name -> scores of (queries, documents), and whether a document has a single vector."""
    source, copy = (SentenceTransformer(x, device="cpu") for x in (options.source, options.copy))
    longest = source.max_seq_length
    sizes = options.windows or [longest]
    if max(sizes) > longest:
        raise SystemExit(f"--windows {max(sizes)}: expected at most the source's {longest} tokens")
    found = {"BM25": (bm25(texts, queries), False)}

    def add(name: str, asked: np.ndarray, windows: dict[int, list[np.ndarray]]) -> None:
        for size in sizes:
            mean = np.stack([unit(x).mean(0) for x in windows[size]])
            found[f"{name}, mean of windows of {size}"] = asked @ unit(mean).T, True
            found[f"{name}, best window of {size}"] = best_window(asked, windows[size]), False

    asked = unit(source.encode(queries))
    windows = {size: read_windows(source, texts, size) for size in {*sizes, longest}}
    first = np.stack([x[0] for x in windows[longest]])
    found[f"source, first {longest} tokens"] = asked @ unit(first).T, True
    add("source", asked, windows)
    asked = unit(copy.encode(queries))
    whole, windows = read_whole(copy, texts, sizes)
    found["copy, one pass, mean of all tokens"] = asked @ unit(whole).T, True
    add("copy, one pass", asked, windows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("copy")
    for name in ("documents", "queries"):
        parser.add_argument(f"--{name}", required=True, metavar="JSONL")
    parser.add_argument("--chapters", type=int, help="take so many of the documents, evenly spread")
    parser.add_argument(
        "--windows",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="of windows, from 3 to what the source takes, which is the default",
    )
    options = parser.parse_args()
    if min(options.windows or [3]) < 3:
        parser.error(f"--windows {min(options.windows)}: expected at least 3 tokens")
    texts, queries, answers, early = load(options)
    print(f"{len(texts)} documents, {len(queries)} queries, {early.sum()} from first halves\n")
    print(HEAD, "|---|---|---:|---:|---:|", sep="\n")
    for name, (scores, single) in all_scores(options, texts, queries).items():
        found = 100 * hits(scores, answers)
        shares = f"{found[early].mean():.1f} | {found[~early].mean():.1f} | {found.mean():.1f}"
        print(f"| {name} | {'yes' if single else 'no'} | {shares} |")


if __name__ == "__main__":
    main()
