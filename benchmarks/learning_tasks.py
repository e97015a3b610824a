"""The tasks of benchmarks/learning.py: what is learnt, from which file, and how it is measured.

A task is a row of `TASKS`. Its data give training batches for ever, and measure a model on held-out
samples. The data of every seed are the same for all models.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor
from transformers import BertTokenizer, BertTokenizerFast

VOCABULARY = 8192
MASKING, VALIDATION_MASKING = 0.3, 0.15
PARTS = {"train": "train", "validation": "test"}  # of an image folder
MEASURED_ROWS = 16  # at a time, so that all models need little memory

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Args:
        kind: "text" for masked language modelling, "recall" for pairs to be recalled, "labels" for
            texts with a class, "images" for images with one.
        batch: rows per step.
        length: tokens per row, at most.
        steps: steps of a run.
        pairs: key-value pairs per row of associative recall.
        source: the task whose weights a model starts from; None to start anew.
        folder: where in the data folder its files are.
    """

    kind: str
    batch: int
    length: int
    steps: int
    pairs: int = 0
    source: str | None = None
    folder: str = ""

    @property
    def measure(self) -> str:
        """What models are compared by."""
        return "loss" if self.kind == "text" else "accuracy"


TASKS = {
    "mlm-128": Task("text", batch=16, length=128, steps=1200, folder="speeches"),
    "mlm-512": Task("text", batch=4, length=512, steps=600, folder="speeches"),
    "recall-64": Task("recall", batch=64, length=64, steps=1500, pairs=4),
    "recall-512": Task("recall", batch=16, length=512, steps=1500, pairs=64),
    "sentiment": Task(
        "labels", batch=32, length=64, steps=500, source="mlm-128", folder="sentiment"
    ),
    "pairs": Task("labels", batch=32, length=128, steps=500, source="mlm-128", folder="pairs"),
    "chapters": Task(
        "labels", batch=4, length=2048, steps=400, source="mlm-512", folder="chapters"
    ),
    "fashion-mnist": Task("images", batch=64, length=50, steps=900, folder="fashion_mnist"),
}


class Data(Protocol):
    """What a task learns from."""

    classes: int

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training batches without end."""

    def measure(self, model: nn.Module, rows: int) -> dict[str, float]:
        """Loss in nats and accuracy on at most so many held-out samples."""


def load(task: Task, folder: Path, cache: Path) -> Data:
    """The data of a task.

    Args:
        task: a row of `TASKS`.
        folder: of the data, with a folder for each.
        cache: where the tokenizer is kept.

    Raises:
        FileNotFoundError: if the folder does not hold the task's files.
    """
    if task.kind == "recall":
        return Recall(task.pairs, task.length)
    place = folder / task.folder
    if not place.is_dir():
        raise FileNotFoundError(f"--data {folder}: expected a folder {task.folder} in it")
    if task.kind == "images":
        return Images(place)
    tokenizer = _tokenizer(folder / TASKS["mlm-128"].folder, cache)
    if task.kind == "text":
        return Text(tokenizer, place, task.length)
    return LabelledTexts(tokenizer, place, task.length)


class Text:
    """Text as rows of one length, paragraph after paragraph, masked by seed and step."""

    classes = 0

    def __init__(self, tokenizer: BertTokenizerFast, folder: Path, length: int):
        self.mask, self.words = tokenizer.mask_token_id, len(tokenizer)
        self.special = len(tokenizer.all_special_tokens)
        self.rows = {
            part: _rows(tokenizer, folder / f"{part}.txt", length)
            for part in ("train", "validation")
        }

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training batches without end."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.rows["train"]
        for chosen in _chosen(len(rows), batch, generator):
            yield self.masked(rows[chosen], MASKING, generator)

    def masked(self, rows: torch.Tensor, share: float, generator: torch.Generator) -> Batch:
        """Rows of which a share of the tokens is to be predicted.

        80 % of these are hidden, and 10 % are replaced by random words.
        """
        chosen = torch.rand(rows.shape, generator=generator) < share
        how = torch.rand(rows.shape, generator=generator)
        words = torch.randint(self.special, self.words, rows.shape, generator=generator)
        ids = torch.where(
            chosen & (how < 0.8), self.mask, torch.where(chosen & (how > 0.9), words, rows)
        )
        return {"input_ids": ids, "labels": torch.where(chosen, rows, -100)}

    def measure(self, model: nn.Module, rows: int) -> dict[str, float]:
        """Loss in nats and accuracy over the masked tokens of validation rows."""
        generator = torch.Generator().manual_seed(1234)
        pieces = self.rows["validation"][:rows].split(MEASURED_ROWS)
        return _measure(model, (self.masked(x, VALIDATION_MASKING, generator) for x in pieces))


class Recall:
    """Associative recall: pairs of a key and a value, then keys whose values are to be named.

    This is MQAR (arXiv 2312.04927). Keys and values have halves of the vocabulary of their own, and
    no key occurs in two pairs of a row. Queries are at random places of the rest of the row.
    """

    classes = 0

    def __init__(self, pairs: int, length: int):
        self.pairs, self.length = pairs, length

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training batches without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.make(batch, generator)

    def make(self, batch: int, generator: torch.Generator) -> Batch:
        """A batch: labels stand at the queries."""
        half = VOCABULARY // 2
        keys = torch.rand(batch, half, generator=generator).argsort(1)[:, : self.pairs] + 1
        values = torch.randint(half + 1, VOCABULARY, (batch, self.pairs), generator=generator)
        ids = torch.zeros(batch, self.length, dtype=torch.long)
        labels = torch.full((batch, self.length), -100)
        ids[:, 0 : 2 * self.pairs : 2], ids[:, 1 : 2 * self.pairs : 2] = keys, values
        room = self.length - 2 * self.pairs
        places = (
            torch.rand(batch, room, generator=generator).argsort(1)[:, : self.pairs]
            + 2 * self.pairs
        )
        ids.scatter_(1, places, keys)
        labels.scatter_(1, places, values)
        return {"input_ids": ids, "labels": labels}

    def measure(self, model: nn.Module, rows: int) -> dict[str, float]:
        """Loss in nats and accuracy over queries of fresh rows."""
        generator = torch.Generator().manual_seed(1234)
        count = range(0, rows, MEASURED_ROWS)
        return _measure(model, (self.make(min(MEASURED_ROWS, rows), generator) for _ in count))


class LabelledTexts:
    """Texts with a class, padded to the longest of a batch.

    Sentences or pairs of them come from `train.csv` and `validation.csv`. Whole chapters come from
    `documents.jsonl`: their class is the book, and every fifth chapter is held out.
    """

    def __init__(self, tokenizer: BertTokenizerFast, folder: Path, length: int):
        self.pad = tokenizer.pad_token_id
        parts = _chapters(folder) if (folder / "documents.jsonl").is_file() else _tables(folder)
        names = sorted({label for _, label in parts["train"]})
        self.classes = len(names)
        self.parts = {
            part: [
                (_tokens(tokenizer, texts, length), names.index(label))
                for texts, label in rows
                if label in names
            ]
            for part, rows in parts.items()
        }

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training batches without end."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.parts["train"]
        for chosen in _chosen(len(rows), batch, generator):
            yield self.collate([rows[n] for n in chosen.tolist()])

    def collate(self, rows: list[tuple[list[int], int]]) -> Batch:
        """A batch of rows of tokens with their labels."""
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _ in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
        labels = torch.tensor([label for _, label in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def measure(self, model: nn.Module, rows: int) -> dict[str, float]:
        """Loss in nats and accuracy on all held-out texts, by length to save padding."""
        ordered = sorted(self.parts["validation"][: 4 * rows], key=lambda row: len(row[0]))
        pieces = range(0, len(ordered), MEASURED_ROWS)
        return _measure(model, (self.collate(ordered[n : n + MEASURED_ROWS]) for n in pieces))


class Images:
    """Grey images of 28 x 28 pixels, in the folders train/ and test/ by class: Fashion-MNIST.

    The training images are mirrored at random.
    """

    def __init__(self, folder: Path):
        self.parts = {part: _pixels(folder / name) for part, name in PARTS.items()}
        self.classes = int(self.parts["train"][1].max()) + 1

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training batches without end."""
        generator = torch.Generator().manual_seed(seed)
        pixels, labels = self.parts["train"]
        for chosen in _chosen(len(labels), batch, generator):
            mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
            images = torch.where(mirrored, pixels[chosen].flip(-1), pixels[chosen])
            yield {"pixel_values": images, "labels": labels[chosen]}

    def measure(self, model: nn.Module, rows: int) -> dict[str, float]:
        """Loss in nats and accuracy on the test images."""
        pixels, labels = (x[: 16 * rows].split(256) for x in self.parts["validation"])
        return _measure(model, ({"pixel_values": x, "labels": y} for x, y in zip(pixels, labels)))


def _pixels(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a folder, (N, 1, H, W) from -1 to 1, and the numbers of their classes."""
    from PIL import Image

    pixels, labels = [], []
    for label, place in enumerate(sorted(x for x in folder.iterdir() if x.is_dir())):
        for file in sorted(place.glob("*.png")):
            with Image.open(file) as image:
                pixels.append(pil_to_tensor(image.convert("L")))
            labels.append(label)
    return torch.stack(pixels).float() / 127.5 - 1, torch.tensor(labels)


@torch.no_grad()
def _measure(model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
    sums = torch.zeros(3)
    for batch in batches:
        labels = batch["labels"][batch["labels"] != -100]
        logits = model(**batch).logits
        if logits.dim() == 3:  # of all tokens, where a model does not leave the others out
            logits = logits[batch["labels"] != -100]
        right = (logits.argmax(-1) == labels).sum()
        sums += torch.tensor([F.cross_entropy(logits, labels, reduction="sum"), right, len(labels)])
    return {"loss": (sums[0] / sums[2]).item(), "accuracy": (sums[1] / sums[2]).item()}


def _chosen(count: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Numbers of the rows of every batch, without end; the rest of an epoch is left out.

    Raises:
        ValueError: for fewer rows than a batch takes.
    """
    if count < batch:
        raise ValueError(f"{count} rows of training data: expected at least a batch of {batch}")
    while True:
        for chosen in torch.randperm(count, generator=generator).split(batch):
            if len(chosen) == batch:
                yield chosen


def _tokenizer(folder: Path, cache: Path) -> BertTokenizerFast:
    """A tokenizer of the speeches, made once."""
    place = cache / "tokenizer"
    if not (place / "tokenizer.json").is_file():
        with (folder / "train.txt").open(encoding="utf-8") as text:
            tokenizer = BertTokenizer().train_new_from_iterator(
                text, vocab_size=VOCABULARY, show_progress=False
            )
        tokenizer.save_pretrained(place)
    return BertTokenizerFast.from_pretrained(place)


def _rows(tokenizer: BertTokenizerFast, file: Path, length: int) -> torch.Tensor:
    with file.open(encoding="utf-8") as text:
        lines = [line for line in text if not line.isspace()]
    documents = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(
        [token for document in documents for token in (*document, tokenizer.sep_token_id)]
    )
    return ids[: len(ids) // length * length].view(-1, length)


def _tokens(tokenizer: BertTokenizerFast, texts: tuple[str, ...], length: int) -> list[int]:
    return tokenizer(*texts, truncation=True, max_length=length, verbose=False)["input_ids"]


def _tables(folder: Path) -> dict[str, list[tuple[tuple[str, ...], str]]]:
    """Texts and label of every row."""
    parts = {}
    for part in ("train", "validation"):
        with (folder / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        names = [name for name in rows[0] if name.startswith("sentence")]
        parts[part] = [(tuple(row[name] for name in names), row["label"]) for row in rows]
    return parts


def _chapters(folder: Path) -> dict[str, list[tuple[tuple[str, ...], str]]]:
    """Whole chapters with their book, which the number of a chapter begins with."""
    lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    labelled = [((row["text"],), f"{int(row['id']) // 1000:02d}") for row in rows]
    return {
        "train": [row for n, row in enumerate(labelled) if n % 5 != 4],
        "validation": [row for n, row in enumerate(labelled) if n % 5 == 4],
    }
