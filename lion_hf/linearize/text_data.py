"""Texts for distillation: lines of a file, or columns of a table, as tokens."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..convert.errors import ConversionError
from ..data.masking import MaskTokens, pad_rows
from ..data.samples import SeededDataset, SkippedSample
from ..modeling.modeling_lion import LionPreTrainedModel
from .losses import problem_type
from .pieces import FEWEST_LETTERS, in_pieces
from .settings import HELD_OUT, Distillation
from .text_sources import TextReader, check_words, hold_out, name_of

MAX_LENGTH = 256  # tokens per text, unless asked otherwise
# Random tokens in the place of some teach the copy about words that the texts lack: it comes nearer
# on text of other kinds (benchmarks/results/linearize.md).
REPLACED_TEXTS, REPLACED_TOKENS = 0.5, 0.15  # share of the texts, and of the tokens of those


def texts(
    student: LionPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Distillation,
    seed: int,
    longest: int | None = None,
) -> tuple[SeededDataset, SeededDataset, "TextBatches", list[str]]:
    """As `lesson_data`, of texts."""
    longest = longest or student.config.max_position_embeddings
    _check(student, tokenizer, settings, longest)
    config, kind, head = student.config, problem_type(student), type(student).__name__
    masked = head == "LionForMaskedLM"
    labelled = head == "LionForSequenceClassification" and (
        kind == "single_label_classification" or (kind == "regression" and config.num_labels == 1)
    )
    prepare = TextSamples(tokenizer, settings, masked, longest)
    # Labels belong to the original words.
    replace = ReplaceTokens(tokenizer) if settings.alpha == 1 and not masked else None
    prepare_training = TextSamples(tokenizer, settings, masked, longest, replace)
    reader = TextReader(settings, config, labelled)
    rows, others, notes = reader.train(), reader.validation(), reader.notes
    pairs = "sentence2" in rows[0]
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if settings.max_length is not None and settings.max_length <= special:
        raise ConversionError(
            f"max_length={settings.max_length}: expected more than {special}, the special tokens"
            f" of a {'pair' if pairs else 'text'}"
        )
    check_words(rows, tokenizer, name_of(settings), masked)
    if others is not None:
        check_words(others, tokenizer, name_of(settings, "validation_file"), masked)
    else:  # whole texts, before they are cut
        runs = HELD_OUT if settings.wants_documents else None
        rows, others, note = hold_out(rows, settings.validation_samples, runs)
        notes.append(note)
    if [*rows[0]] == ["sentence1"]:  # neither pairs nor labels, which are of whole texts
        rows = in_pieces(rows, seed)
        if not rows:
            raise ConversionError(
                f"{name_of(settings)}: expected sentences, but none of the texts has"
                f" {FEWEST_LETTERS} letters in one"
            )
    train = SeededDataset(rows, prepare_training, seed)
    validation = SeededDataset(others, prepare, seed, vary=False)
    for row in (train[0], validation[0]):
        _check_types(row, config.type_vocab_size)
    return train, validation, TextBatches(tokenizer.pad_token_id, labelled), notes


def _check(
    student: LionPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Distillation,
    longest: int,
) -> None:
    if settings.data_path or not (settings.train_file or settings.dataset):
        raise ConversionError(
            f"data_path={settings.data_path!r}: the source reads text, which needs train_file or"
            " dataset; data_path is for images"
        )
    if settings.max_length is not None and settings.max_length > longest:
        raise ConversionError(
            f"max_length={settings.max_length}: expected at most {longest}, as many tokens as the"
            " source takes"
        )
    if type(student).__name__ == "LionForMaskedLM" and tokenizer.mask_token is None:
        raise ConversionError(
            "the tokenizer has no mask token, which a masked language model needs"
        )
    if tokenizer.pad_token_id is None:
        raise ConversionError(
            "the tokenizer has no padding token, which the short texts of a batch need"
        )


def _check_types(row: dict[str, Any], known: int) -> None:
    """Raises ConversionError if a row has token types that the source does not know."""
    types = row.get("token_type_ids")
    if types is not None and types.max() >= known:
        raise ConversionError(
            f"the source's tokenizer gives token type {int(types.max())} (the second text of a pair"
            f" has type 1), but the source has type_vocab_size={known}: expected single texts, or a"
            " tokenizer that fits the model"
        )


class TextSamples:
    """Makes tokens of a row, with labels, or with masks and the masked tokens as labels.

    Args:
        tokenizer: the model's.
        settings: length, and share of masked tokens.
        masked: whether to mask.
        longest: tokens that the source takes.
        replace: what replaces tokens; None for the texts as they are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: Distillation,
        masked: bool,
        longest: int,
        replace: "ReplaceTokens | None" = None,
    ):
        self.tokenizer, self.replace = tokenizer, replace
        self.max_length = settings.max_length or min(MAX_LENGTH, longest)
        self.mask = MaskTokens(tokenizer, settings.mask_probability) if masked else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        sentences = [row[name] for name in ("sentence1", "sentence2") if name in row]
        tokens = self.tokenizer(*sentences, truncation=True, max_length=self.max_length)
        names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
        prepared = {name: torch.tensor(tokens[name], dtype=torch.long) for name in names}
        if not len(prepared["input_ids"]):
            raise SkippedSample(f"{sentences[0][:40]!r} has no token that the source knows")
        if self.replace is not None:
            prepared["input_ids"] = self.replace(prepared["input_ids"])
        if self.mask is not None:
            return self.mask(prepared)
        return prepared | {name: row[name] for name in row if name == "labels"}


class ReplaceTokens:
    """Replaces some tokens of some texts with random ones of the vocabulary.

    Special tokens stay where they are, and none is put in.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        added = tokenizer.added_tokens_decoder.items()
        special = {*tokenizer.all_special_ids, *(n for n, token in added if token.special)}
        self.special = torch.tensor(sorted(special), dtype=torch.long)
        known = torch.tensor(sorted(tokenizer.get_vocab().values()))
        self.words = known[~torch.isin(known, self.special)]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens of a text, (L,), some of them replaced, by torch's random state."""
        if torch.rand(()) >= REPLACED_TEXTS or not len(self.words):
            return tokens
        others = self.words[torch.randint(len(self.words), tokens.shape)]
        chosen = torch.rand(tokens.shape) < REPLACED_TOKENS
        return torch.where(chosen & ~torch.isin(tokens, self.special), others, tokens)


class TextBatches:
    """Makes a batch of rows of tokens, with the labels of rows as a whole, or of a long document.

    Args:
        pad_token_id: what short rows are filled with.
        labelled: whether rows have a label; those of tokens are padded as the tokens are.
    """

    def __init__(self, pad_token_id: int, labelled: bool):
        self.pad_token_id, self.labelled = pad_token_id, labelled

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad_rows(rows, self.pad_token_id)
        if "passages" in rows[0]:  # a long document, which has no labels
            return batch | {"passages": torch.tensor([row["passages"] for row in rows])}
        if self.labelled and "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch
