"""How near a linearized sentence encoder is to its source.

    python benchmarks/linearize_quality.py SOURCE COPY --pairs pairs/validation.csv \\
        --texts sentiment/validation.csv --train sentiment/train.csv

SOURCE and COPY are folders of sentence-transformers. `--pairs` is a table with `sentence1` and
`sentence2`; rows whose `label` is 0 are left out. `--texts` and `--train` are tables with
`sentence` and `label`: the cosine is measured on the first, and a linear classifier of frozen
embeddings learns from the second and is measured on the first. It prints a table in Markdown, or
with `--json` an object.
"""

import argparse
import csv
import json

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression

from lion_hf.linearize import distillation  # and LION is registered: no remote code is needed

MOST_PAIRS = 1000  # texts that a query is compared with
MOST_COMPARED = 1000  # texts of which all pairs are ranked


def cosines(source: np.ndarray, copy: np.ndarray) -> float:
    """The mean cosine of embeddings of the same texts, (N, D) each."""
    return float((_unit(source) * _unit(copy)).sum(1).mean())


def rank_correlation(source: np.ndarray, copy: np.ndarray) -> float:
    """Spearman's correlation of the similarities of all pairs of texts, from (N, D) each."""
    both = (torch.from_numpy(np.ascontiguousarray(x)) for x in (source, copy))
    return distillation.rank_correlation(*both)


def retrieval(queries: np.ndarray, answers: np.ndarray) -> float:
    """The percentage of queries whose own answer is the nearest, from (N, D) each."""
    nearest = (_unit(queries) @ _unit(answers).T).argmax(1)
    return 100 * float((nearest == np.arange(len(queries))).mean())


def probe(train: np.ndarray, labels: list[str], test: np.ndarray, truth: list[str]) -> float:
    """The accuracy in percent of a logistic regression on embeddings, (N, D) each."""
    return 100 * float(LogisticRegression(max_iter=5000).fit(train, labels).score(test, truth))


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def _columns(file: str, *names: str) -> list[list[str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    if missing := {*names} - {*rows[0]}:
        raise SystemExit(f"{file}: no columns {sorted(missing)}; there are {[*rows[0]]}")
    if "sentence2" in names:
        rows = [row for row in rows if row.get("label") != "0"][:MOST_PAIRS]
    return [[row[name] for row in rows] for name in names]


def measure(folders: tuple[str, str], files: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Figures of the source, of the copy, and between the two."""
    queries, answers = _columns(files.pairs, "sentence1", "sentence2")
    texts, truth = _columns(files.texts, "sentence", "label")
    lessons, labels = _columns(files.train, "sentence", "label")
    figures: dict[str, dict[str, float]] = {}
    embedded = []
    for name, folder in zip(("source", "copy"), folders):
        model = SentenceTransformer(folder, device=files.device)
        parts = [model.encode(x, batch_size=64) for x in (queries, answers, texts, lessons)]
        embedded.append(parts)
        figures[name] = {
            "retrieval": retrieval(*parts[:2]),
            "probe": probe(parts[3], labels, parts[2], truth),
        }
    (first, _, third, _), (mine, _, own, _) = embedded
    figures["between"] = {
        "cosine of texts": cosines(third, own),
        "cosine of queries": cosines(first, mine),
        "Spearman of texts": rank_correlation(third[:MOST_COMPARED], own[:MOST_COMPARED]),
        "Spearman of queries": rank_correlation(first, mine),
    }
    return figures


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures in Markdown."""
    source, copy, between = (figures[name] for name in ("source", "copy", "between"))
    lines = ["| | source | copy |", "|---|---:|---:|"]
    for name, words in (
        ("retrieval", "queries that find their own answer (%)"),
        ("probe", "linear probe, accuracy (%)"),
    ):
        lines.append(f"| {words} | {source[name]:.1f} | {copy[name]:.1f} |")
    lines += [f"| {name} | 1 | {value:.3f} |" for name, value in between.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("copy")
    for name in ("pairs", "texts", "train"):
        parser.add_argument(f"--{name}", required=True, metavar="CSV")
    parser.add_argument("--device", help="such as cpu or cuda; the best there is if not given")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = measure((options.source, options.copy), options)
    print(json.dumps(figures) if options.json else table(figures))


if __name__ == "__main__":
    main()
