"""Long documents for a copy that takes more tokens than its source.

The source reads passages of a document, each on its own. The copy reads the document in one pass
and learns to give, for each passage, what the source gives. Passages are shorter than what the
source reads at once: the vector of a document then finds more of what is asked about a part of it.
Still shorter ones would take the copy further from its source on texts of a few hundred tokens
(benchmarks/results/linearize.md).

Legend: P tokens of a passage without its special tokens, N passages of a document.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..convert.errors import ConversionError
from ..data.samples import SeededDataset, sample_seed
from .copying import SPECIAL_TOKENS
from .distillation import Lesson
from .settings import HELD_OUT, Distillation
from .text_sources import name_of

PASSAGE = 128  # tokens, without the special ones
FEWEST_WINDOWS = 2  # of the source, in the shortest document
LONGEST = 4096  # tokens of a document to learn from: a step has to be affordable
HELD_OUT_WINDOWS = 4


class Documents(Dataset):
    """Endless documents of consecutive texts, each as long as some passages and special tokens.

    A document depends on its index and the seed alone. Most are short, because a step has to be
    affordable: of documents of 3 to 31 passages, half have at most 5.

    Args:
        texts: rows with `sentence1`, in their order.
        tokenizer: the source's.
        passage: P.
        passages: the least and the largest N.
        seed: of where documents begin and of their lengths.
    """

    def __init__(
        self,
        texts: Any,
        tokenizer: PreTrainedTokenizerBase,
        passage: int,
        passages: tuple[int, int],
        seed: int,
    ):
        self.texts, self.tokenizer, self.seed = texts, tokenizer, seed
        self.passage, self.passages = passage, passages

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = random.Random(sample_seed(self.seed, index))
        least, most = self.passages
        count = int(least * ((most + 1) / least) ** generator.random() ** 2)
        start, wanted = generator.randrange(len(self.texts)), count * self.passage
        ids: list[int] = []
        for found in self._tokens(start):
            ids += found
            if len(ids) >= wanted:
                break
        first, last = self.tokenizer("")["input_ids"]
        return {"input_ids": torch.tensor([first, *ids[:wanted], last]), "passages": count}

    def _tokens(self, start: int) -> Iterator[list[int]]:
        """The tokens of texts from one on, from the first again after the last."""
        place = start
        while True:
            text = self.texts[place % len(self.texts)]["sentence1"]
            yield self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            place += 1

    def count_tokens(self) -> int:
        """Tokens of all texts, counted until they are enough for the shortest document."""
        count = 0
        for row in self.texts:
            if count >= self.passages[0] * self.passage:
                break
            tokens = self.tokenizer(row["sentence1"], add_special_tokens=False, verbose=False)
            count += len(tokens["input_ids"])
        return count


def check_documents(lesson: Lesson, tokenizer: Any, settings: Distillation) -> bool:
    """Whether a run is to learn from long documents.

    Args:
        lesson: copy and source.
        tokenizer: the source's, or its image processor.
        settings: whether they are asked for.

    Raises:
        ConversionError: if it is, and the copy cannot.
    """
    if not settings.wants_documents:
        return False
    student, problem = lesson.student, ""
    head, longest = type(student).__name__, student.config.max_position_embeddings
    if lesson.window is None:
        problem = "images have no windows"
    elif head != "LionModel":
        problem = f"long documents are for encoders without a head, and this is a {head}"
    elif (special := tokenizer.num_special_tokens_to_add()) != SPECIAL_TOKENS:
        problem = (
            f"a window has a special token at each end, and the source's tokenizer adds {special}"
        )
    elif longest < (least := FEWEST_WINDOWS * (lesson.window - SPECIAL_TOKENS) + SPECIAL_TOKENS):
        problem = (
            f"the copy takes {longest} tokens, and the shortest document, two windows of its"
            f" source, has {least}; --max_position_embeddings gives it more"
        )
    if problem:
        name = "document_share" if settings.document_share else "document_steps"
        raise ConversionError(f"{name}={getattr(settings, name)}: expected 0, because {problem}")
    return True


def long_documents(
    lesson: Lesson,
    data: tuple[SeededDataset, SeededDataset],
    tokenizer: PreTrainedTokenizerBase,
    settings: Distillation,
    seed: int,
) -> tuple[Documents | None, list[dict[str, Any]]]:
    """Documents to learn from, and some to measure on; none if they are not asked for.

    Args:
        lesson: copy and source.
        data: texts to learn from and to measure on, in their order.
        tokenizer: the source's.
        settings: where the texts came from.
        seed: of the documents.

    Raises:
        ConversionError: as `check_documents`, or if all texts together are too short for one.
    """
    if not check_documents(lesson, tokenizer, settings):
        return None, []
    assert lesson.window is not None  # as was checked
    window = lesson.window - SPECIAL_TOKENS
    passage = min(PASSAGE, window)
    longest = min(lesson.student.config.max_position_embeddings, LONGEST)
    least = FEWEST_WINDOWS * window // passage
    most = max((longest - SPECIAL_TOKENS) // passage, least)
    train, others = (
        Documents(x.dataset, tokenizer, passage, (least, n), seed)
        for x, n in zip(data, (most, min(most, HELD_OUT_WINDOWS * window // passage)))
    )
    for use, found in (("learn from", train), ("measure on", others)):
        count, tokens = found.count_tokens(), least * passage
        if count < tokens:
            raise ConversionError(
                f"{name_of(settings)}: the texts to {use} have {count} tokens in all, and a long"
                f" document has at least {tokens}: expected more text, or no document_share"
            )
    return train, [others[n] for n in range(HELD_OUT)]
