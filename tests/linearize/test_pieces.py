"""Long texts in pieces."""

import random

import pytest

from lion_hf.linearize.pieces import LONGEST, SHORTEST, USUAL, in_pieces, split

SENTENCE = "The committee met on the first day of the month, and heard the report."


def pieces(text: str, seed: int = 0) -> list[str]:
    return list(split(text, random.Random(seed)))


def test_every_word_is_kept_in_order():
    text = " ".join(f"Sentence {n} of many ends here." for n in range(200))
    found = pieces(text)
    assert " ".join(found) == text
    assert len(found) > 10 and all(len(piece) <= LONGEST for piece in found)


def test_pieces_end_with_their_sentences_and_vary_in_length():
    found = pieces(" ".join([SENTENCE] * 1000))
    assert all(piece.endswith("report.") for piece in found)
    lengths = sorted(map(len, found))
    assert SHORTEST <= lengths[0] < 80 and USUAL < lengths[-1] <= LONGEST
    long = [length for length in lengths if length > USUAL]
    assert 0.05 < len(long) / len(lengths) < 0.15
    assert 0.2 < sum(long) / sum(lengths) < 0.5


@pytest.mark.parametrize("text", ["word " * 300, "字" * 1000, "a" * 600])
def test_a_long_sentence_is_cut(text):
    found = pieces(text.strip())
    assert len(found) > 1 and all(len(piece) <= LONGEST for piece in found)
    joined = (" " if " " in text else "").join(found)
    assert joined == text.strip()
    assert all(set(piece.split()) == {"word"} for piece in found if " " in text)


def test_sentences_of_other_scripts_and_lines():
    assert pieces("今天天气很好，我们去公园散步吧。" * 30)[0].endswith("。")
    short = "A line without a full stop\n\n  and another line\n"
    assert pieces(short) in (
        ["A line without a full stop and another line"],
        ["A line without a full stop", "and another line"],
    )


def test_what_is_no_text_is_left_out():
    assert pieces("12.\n\n* * *\n-- 7 --") == []
    assert pieces("Yes.") == ["Yes."]


def test_rows_keep_their_other_columns_and_the_seed_decides():
    rows = [{"sentence1": " ".join([SENTENCE] * 9), "id": n} for n in range(20)]
    found = in_pieces(rows, seed=1)
    assert [row["id"] for row in found] == sorted(row["id"] for row in found)
    assert {row["id"] for row in found} == set(range(20))
    assert found == in_pieces(rows, seed=1) != in_pieces(rows, seed=2)
