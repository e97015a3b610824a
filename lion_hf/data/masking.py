"""Masked tokens, and rows padded to a batch."""

from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many embeddings a tokenizer needs: its largest id and one.

    This is more than `len(tokenizer)` for a vocabulary with gaps.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


class MaskTokens:
    """Chooses tokens to predict, as BERT does.

    Of these, 80 % become the mask token, 10 % a random one, and 10 % stay.

    Args:
        tokenizer: with a mask token.
        probability: share of tokens to choose; special tokens are spared.
        whole_words: choose words, by the row's `word_ids`, with all their tokens.

    Returns (when called with a row):
        The row's columns as int64 tensors, with `labels` (-100 where nothing was chosen) and
        without `word_ids`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, probability: float, whole_words: bool = False
    ):
        if not isinstance(probability, int | float) or not 0 < probability < 1:
            raise ValueError(f"mask probability {probability!r}: expected a number between 0 and 1")
        self.probability, self.whole_words = probability, whole_words
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.replace = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=1.0
        ).torch_mask_tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        row = {name: torch.as_tensor(row[name]) for name in row}
        units = row.pop("word_ids", None)
        tokens = row["input_ids"]
        if not self.whole_words:
            units = torch.arange(len(tokens))
        elif (
            units is None
            or units.shape != tokens.shape
            or not 0 <= units.min() <= units.max() < len(tokens)
        ):
            shown = None if units is None else units[:8].tolist()
            raise ValueError(
                f"word_ids {shown}: expected the number of its word, from 0, for each of"
                f" {len(tokens)} tokens"
            )
        if len(tokens) == 0:
            return {**row, "labels": tokens}
        chosen = (torch.rand(int(units.max()) + 1) < self.probability)[units] & ~torch.isin(
            tokens, self.special
        )
        row["input_ids"], row["labels"] = (
            x[0] for x in self.replace(tokens[None].clone(), ~chosen[None])
        )
        return row


def pad_rows(rows: list[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch from rows of different lengths.

    Columns of tensors (L,) become (B, longest L); others are left out. `labels` are padded with
    -100, `input_ids` with the padding token, `seq_idx` with the row's last, and others with 0. An
    `attention_mask` is made if there is padding.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {}
    for name in rows[0]:
        if torch.is_tensor(rows[0][name]) and rows[0][name].dim() == 1:
            fill = {"labels": -100, "input_ids": pad_token_id}.get(name, 0)
            columns = [row[name] for row in rows]
            fills = [column[-1] if name == "seq_idx" else fill for column in columns]
            batch[name] = torch.stack(
                [
                    torch.cat([x, x.new_full((longest - len(x),), int(fill))])
                    for x, fill in zip(columns, fills)
                ]
            )
    if lengths.min() < longest:
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch
