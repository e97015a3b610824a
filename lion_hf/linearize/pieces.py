"""Long texts in pieces of a sentence or a few.

A step on short texts costs less, and nothing of a long text is cut off.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

# Characters of a piece, about 8 to 60 tokens of English. Lengths are spread evenly in their
# logarithm, so that the copy learns from texts of all lengths.
SHORTEST, LONGEST = 40, 280
# The end of a sentence in most scripts, or of a line.
SENTENCE_END = re.compile(r"(?<=[.!?;:…])\s+|(?<=[。！？；])|\s*\n\s*")
FEWEST_LETTERS = 3  # less, such as a number of a page, is no text


def in_pieces(rows: Iterable[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows with a single text each as rows with pieces of these texts.

    Args:
        rows: with the text as `sentence1`; what else they have is kept in each piece.
        seed: of the pieces' lengths.
    """
    generator = random.Random(seed)
    return [
        row | {"sentence1": piece} for row in rows for piece in split(row["sentence1"], generator)
    ]


def split(text: str, generator: random.Random) -> Iterator[str]:
    """Cuts a text at ends of sentences, and only a long sentence elsewhere.

    A piece is as many whole sentences as it takes to reach a length that is drawn for it, at most
    `LONGEST` characters.
    """
    piece, wanted = "", _length(generator)
    for sentence in _short_sentences(text):
        if piece and len(piece) + 1 + len(sentence) > LONGEST:
            yield piece
            piece, wanted = "", _length(generator)
        piece = f"{piece} {sentence}" if piece else sentence
        if len(piece) >= wanted:
            yield piece
            piece, wanted = "", _length(generator)
    if piece:
        yield piece


def _length(generator: random.Random) -> float:
    return math.exp(generator.uniform(math.log(SHORTEST), math.log(LONGEST)))


def _short_sentences(text: str) -> Iterator[str]:
    """Sentences with some letters, those above `LONGEST` characters cut between words."""
    for sentence in SENTENCE_END.split(text):
        rest = sentence.strip()
        while len(rest) > LONGEST:
            cut = rest.rfind(" ", LONGEST // 2, LONGEST + 1)
            cut = LONGEST if cut < 0 else cut
            yield rest[:cut].rstrip()
            rest = rest[cut:].lstrip()
        if sum(map(str.isalpha, rest)) >= FEWEST_LETTERS:
            yield rest
