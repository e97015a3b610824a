"""Rows of tokens for masked language modelling, made of documents."""

import logging
import math
from collections.abc import Callable

import datasets
from transformers import PreTrainedTokenizerBase

from .packing import pack
from .samples import spread_evenly

logger = logging.getLogger(__name__)

TOGETHER = 1000  # documents of which rows are made at once, or as many as make
ROWS_TOGETHER = 100  # rows
COUNTED = 256  # documents whose tokens tell how many that are
_AFTER_ALL = 1 << 30  # a number above those of all words


def prepare_rows(
    documents: datasets.Dataset,
    column: str,
    make_rows: Callable[[list[str]], list[dict]],
    workers: int | None = None,
    together: int = TOGETHER,
) -> datasets.Dataset:
    """All rows of the documents. Empty documents are left out and counted in a warning.

    Args:
        documents: a table.
        column: its column of documents.
        make_rows: from a list of documents to rows, such as `make_rows_of`.
        workers: processes that make rows.
        together: documents that `make_rows` gets at once: see `documents_together`.

    Raises:
        ValueError: if the column does not hold text, or no text at all.
    """
    kind = getattr(documents.features[column], "dtype", "lists")
    if kind != "null" and "string" not in kind:
        raise ValueError(f"column {column!r} holds {kind}: expected text")
    empty = sum(is_empty(x) for batch in documents.iter(10_000) for x in batch[column])
    if empty == len(documents):
        raise ValueError(f"column {column!r}: all of the {len(documents)} documents are empty")
    if empty:
        logger.warning("%d of %d documents are empty and left out", empty, len(documents))

    def columns(batch: dict[str, list]) -> dict[str, list]:
        rows = make_rows([document for document in batch[column] if not is_empty(document)])
        names = [name for name in ("input_ids", "word_ids", "seq_idx") if rows and name in rows[0]]
        return {name: [row[name] for row in rows] for name in names}

    return documents.map(
        columns,
        batched=True,
        batch_size=together,
        remove_columns=documents.column_names,
        num_proc=workers,
        desc="preparing rows",
    )


def documents_together(
    documents: datasets.Dataset, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> int:
    """How many documents are cut or packed into rows together.

    What remains of them is a row that is not full, so they have to make many rows.

    Args:
        documents: a table.
        column: its column of documents.
        tokenizer: makes the tokens.
        max_length: tokens per row.
    """
    places = spread_evenly(len(documents), min(len(documents), COUNTED))
    found = documents.select(places)[column]
    texts = [text for text in found if isinstance(text, str) and not is_empty(text)]
    if not texts:
        return TOGETHER
    counted = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    mean = 1 + sum(map(len, counted)) / len(texts)
    return max(TOGETHER, math.ceil(ROWS_TOGETHER * max_length / mean))


def is_empty(document: str | None) -> bool:
    """Whether a document has no text."""
    return not document or document.isspace()


def make_rows_of(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, kind: str, max_length: int
) -> list[dict]:
    """Rows of at most `max_length` tokens.

    Args:
        documents: texts.
        tokenizer: one with [CLS] and [SEP]. If it is written in Python, it does not know words, and
            every token counts as one.
        kind: "padded" puts every document between [CLS] and [SEP], in several rows if it is long;
            "packed" puts several of these into a row; in "blocks", every row begins with [CLS], and
            [SEP] follows every document.
        max_length: tokens per row.

    Returns:
        Rows with `input_ids`, `word_ids` (the number of each token's word), and, if packed,
        `seq_idx` (the number of its document).
    """
    if not documents:
        return []
    encoded = tokenizer(
        documents,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    texts = [
        (ids, encoded.word_ids(n) if tokenizer.is_fast else list(range(len(ids))))
        for n, ids in enumerate(encoded["input_ids"])
        if ids
    ]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    if kind == "blocks":
        return _blocks(texts, cls, sep, max_length - 1)
    size = max_length - 2
    rows = [
        {
            "input_ids": [cls, *ids[n : n + size], sep],
            "word_ids": renumber([-1, *words[n : n + size], _AFTER_ALL]),
        }
        for ids, words in texts
        for n in range(0, len(ids), size)
    ]
    return _packed(rows, max_length) if kind == "packed" else rows


def full_rows_of(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, kind: str, max_length: int
) -> list[dict]:
    """The rows of `make_rows_of` that have `max_length` tokens."""
    rows = make_rows_of(documents, tokenizer, kind, max_length)
    return [row for row in rows if len(row["input_ids"]) == max_length]


def _blocks(texts: list[tuple[list, list]], cls: int, sep: int, size: int) -> list[dict]:
    """Full rows of [CLS] and `size` tokens, cut from all texts one after the other."""
    ids, words, last = [], [], 0
    for document, numbers in texts:
        ids += [*document, sep]
        words += [last + 1 + n for n in numbers] + [last + numbers[-1] + 2]
        last = words[-1]
    return [
        {
            "input_ids": [cls, *ids[n : n + size]],
            "word_ids": renumber([words[n] - 1, *words[n : n + size]]),
        }
        for n in range(0, len(ids), size)
    ]


def _packed(rows: list[dict], max_length: int) -> list[dict]:
    """Several rows in one."""
    packed = []
    for members in pack([len(row["input_ids"]) for row in rows], max_length):
        pieces = [rows[member] for member in members]
        words = [(n, word) for n, piece in enumerate(pieces) for word in piece["word_ids"]]
        packed.append(
            {
                "input_ids": [token for piece in pieces for token in piece["input_ids"]],
                "word_ids": renumber(words),
                "seq_idx": [n for n, piece in enumerate(pieces) for _ in piece["input_ids"]],
            }
        )
    return packed


def renumber(names: list) -> list[int]:
    """0 for the first run of equal names, 1 for the next, and so on."""
    numbers = [0]
    for before, name in zip(names, names[1:]):
        numbers.append(numbers[-1] + (name != before))
    return numbers
