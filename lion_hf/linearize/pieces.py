"""Long texts in pieces, most of them of a sentence or a few.

Many steps on short texts teach more than few on long ones, and nothing of a long text is cut off.
But a copy that has seen short texts alone is far from its source on long ones.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

# Characters of a piece: about 8, 60 and 270 tokens of English. Lengths are spread evenly in their
# logarithm from the first to the second, and for a share of the pieces from there to the third.
SHORTEST, USUAL, LONGEST = 40, 280, 1200
LONG_SHARE = 0.1  # of the pieces, which is a third of the tokens
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

    A piece is as many whole sentences as it takes to reach a length that is drawn for it.
    """
    piece, wanted = "", _length(generator)
    for sentence in _short_sentences(text):
        if piece and len(piece) + 1 + len(sentence) > max(wanted, USUAL):
            yield piece
            piece, wanted = "", _length(generator)
        piece = f"{piece} {sentence}" if piece else sentence
        if len(piece) >= wanted:
            yield piece
            piece, wanted = "", _length(generator)
    if piece:
        yield piece


def _length(generator: random.Random) -> float:
    ends = (USUAL, LONGEST) if generator.random() < LONG_SHARE else (SHORTEST, USUAL)
    return math.exp(generator.uniform(*map(math.log, ends)))


def _short_sentences(text: str) -> Iterator[str]:
    """Sentences with some letters, those above `USUAL` characters cut between words."""
    for sentence in SENTENCE_END.split(text):
        rest = sentence.strip()
        while len(rest) > USUAL:
            cut = rest.rfind(" ", USUAL // 2, USUAL + 1)
            cut = USUAL if cut < 0 else cut
            yield rest[:cut].rstrip()
            rest = rest[cut:].lstrip()
        if sum(map(str.isalpha, rest)) >= FEWEST_LETTERS:
            yield rest
