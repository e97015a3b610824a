"""Several documents in one row."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling

from .masking import vocabulary_size

LONGEST_ROW = 2**31 - 1  # tokens


def pack(lengths: list[int], row_length: int) -> list[list[int]]:
    """Puts documents into few rows, the longest first, each into the first row with room for it.

    Args:
        lengths: tokens of each document.
        row_length: tokens per row.

    Returns:
        For every row the indices of its documents.

    Raises:
        ValueError: if a document has no tokens or more than a row, or the row length is not an
            integer of at least 1.
    """
    _check_row_length(row_length)
    for index, length in enumerate(lengths):
        if not 1 <= length <= row_length:
            raise ValueError(
                f"document {index} of the batch has {length} tokens: expected 1 to"
                f" row_length={row_length}; cut longer ones (truncation=True, max_length=...) or"
                " make the rows longer"
            )
    rows: list[list[int]] = []
    room = np.full(len(lengths), row_length, dtype=np.int32)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # numpy is fast enough for the tens of thousands of a stream
        row = int((room[: len(rows) + 1] >= lengths[index]).argmax())
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def _check_row_length(row_length: int) -> None:
    if (
        not isinstance(row_length, int)
        or isinstance(row_length, bool)
        or not 1 <= row_length <= LONGEST_ROW
    ):
        raise ValueError(
            f"row_length={row_length!r}: expected an integer of at least 1 (and at most"
            f" {LONGEST_ROW})"
        )


@dataclass
class DataCollatorForPackedLanguageModeling(DataCollatorForLanguageModeling):
    """Packs documents into rows of one length and masks tokens for masked language modelling.

    The batch has `input_ids`, `labels` (-100 where nothing was masked), `attention_mask`, and
    `seq_idx`, the number of each token's document in its row, by which LION models keep documents
    apart. All are (rows, row_length) int64. What does not fill a row is padding. A batch of n
    documents has as many rows as they need, so `per_device_train_batch_size` counts documents.

    Args:
        tokenizer: with a mask and a padding token.
        row_length: tokens per row.
        mlm_probability: share of tokens to predict; special tokens and padding are spared.
        mask_replace_prob: share of these that the mask token replaces.
        random_replace_prob: share of these that a random token replaces.
        seed: for masks that do not depend on the global state.

    Raises:
        ValueError: for a row length below 1, causal language modelling, whole-word masking (which
            needs unpacked offsets), or a document that is empty or longer than a row.

    Example:
        >>> collator = DataCollatorForPackedLanguageModeling(tokenizer, row_length=512)
        >>> LionTrainer(model, arguments, data_collator=collator, train_dataset=tokenized)
    """

    row_length: int = 512

    def __post_init__(self):
        _check_row_length(self.row_length)
        for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob"):
            share = getattr(self, name)
            # transformers lets NaN pass
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"{name}={share!r}: expected a probability in [0, 1]")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: expected None or an integer")
        super().__post_init__()
        for name, legal in (
            ("mlm", True),
            ("whole_word_mask", False),
            ("pad_to_multiple_of", None),
            ("return_tensors", "pt"),
        ):
            if getattr(self, name) != legal:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: packed rows are made with {legal!r} only"
                )
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no padding token, which fills the rows' ends: set"
                " tokenizer.pad_token"
            )

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Packs and masks tokenised documents.

        Args:
            examples: each with `input_ids`, and optionally `token_type_ids` and `attention_mask`,
                whose zeros are left out.
        """
        if not examples:
            raise ValueError("an empty list of documents: expected at least one")
        if self.seed is not None and self.generator is None:
            self.create_rng()
        names = ["input_ids"] + ["token_type_ids"] * any(
            "token_type_ids" in example for example in examples
        )
        documents = [
            self._document(names, index, example) for index, example in enumerate(examples)
        ]
        rows = pack([document.shape[1] for document in documents], self.row_length)
        shape = len(rows), self.row_length
        batch = {
            name: torch.zeros(shape, dtype=torch.long)
            for name in (*names, "seq_idx", "attention_mask")
        }
        batch["input_ids"].fill_(self.tokenizer.pad_token_id)
        for row, members in enumerate(rows):
            start = 0
            for number, index in enumerate(members):
                place = row, slice(start, start + documents[index].shape[1])
                for name, tokens in zip(names, documents[index]):
                    batch[name][place] = tokens
                batch["seq_idx"][place], batch["attention_mask"][place] = number, 1
                start = place[1].stop
            batch["seq_idx"][row, start:] = len(members) - 1
        special = torch.isin(batch["input_ids"], torch.tensor(self.tokenizer.all_special_ids))
        batch["input_ids"], batch["labels"] = self.torch_mask_tokens(batch["input_ids"], special)
        return batch

    def numpy_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Not offered: packed rows are made as tensors."""
        raise ValueError("return_tensors='np': packed rows are made with 'pt' only")

    def _document(self, names: list[str], index: int, example: dict[str, Any]) -> torch.Tensor:
        """The named tokens of a document without padding, (names, tokens)."""
        place = f"document {index} of the batch"
        missing = [name for name in names if name not in example]
        if missing:
            raise ValueError(f"{place} has no {missing[0]}: expected {names} in every document")
        padding = ["attention_mask"] * ("attention_mask" in example)
        columns = [_integers(example[name], f"{place} has {name}") for name in (*names, *padding)]
        if any(column.shape != columns[0].shape or column.dim() != 1 for column in columns):
            shapes = [tuple(column.shape) for column in columns]
            raise ValueError(
                f"{place} has columns of shapes {shapes}: expected one number per token in each"
            )
        tokens = torch.stack(columns[: len(names)]).long()
        tokens = tokens[:, columns[-1] != 0] if padding else tokens
        words = len(self.tokenizer)
        if tokens.numel() > 0 and not 0 <= tokens[0].min() <= tokens[0].max() < words:
            words = vocabulary_size(self.tokenizer)  # with gaps, it has larger ids than words
        wrong = tokens[0][(tokens[0] < 0) | (tokens[0] >= words)]
        if wrong.numel() > 0:
            raise ValueError(
                f"{place} has the id {wrong[0]}: expected 0 to {words - 1}, the ids of the"
                " tokenizer"
            )
        return tokens


def _integers(values: Any, what: str) -> torch.Tensor:
    """A tensor of integers; `what` begins the error's text."""
    try:
        column = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} of {type(values).__name__}: expected integers") from error
    other = column.is_floating_point() or column.is_complex() or column.device.type == "meta"
    if column.numel() > 0 and other:
        raise ValueError(f"{what} of {column.dtype} on {column.device}: expected integers")
    return column
