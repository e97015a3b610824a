"""Texts for distillation: lines of a file, or columns of a table, as tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as Table
from transformers import PreTrainedTokenizerBase

from ..convert.errors import ConversionError
from ..data.labelled_text import (
    LABEL_COLUMNS,
    SENTENCE_COLUMNS,
    TextColumns,
    check_columns,
    examples,
)
from ..data.masking import MaskTokens, pad_rows
from ..data.samples import SeededDataset
from ..data.tables import read_table
from ..data.text_files import read_text
from ..modeling.configuration_lion import LionConfig
from ..modeling.modeling_lion import LionPreTrainedModel
from .losses import problem_type
from .settings import Distillation


def texts(
    student: LionPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Distillation,
    seed: int,
) -> tuple[SeededDataset, SeededDataset | None, "TextBatches", list[str]]:
    """As `lesson_data`, of texts."""
    _check(student, tokenizer, settings)
    config, kind, head = student.config, problem_type(student), type(student).__name__
    masked = head == "LionForMaskedLM"
    labelled = head == "LionForSequenceClassification" and (
        kind == "single_label_classification" or (kind == "regression" and config.num_labels == 1)
    )
    prepare = TextSamples(tokenizer, settings, masked)
    parts: list[Any] = []
    notes: list[str] = []
    for file, vary in ((settings.train_file, True), (settings.validation_file, False)):
        rows = None if file is None else _read(file, settings, config, labelled, notes)
        parts.append(None if rows is None else SeededDataset(rows, prepare, seed, vary=vary))
    return parts[0], parts[1], TextBatches(tokenizer.pad_token_id, labelled), notes


def _check(
    student: LionPreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Distillation
) -> None:
    longest = student.config.max_position_embeddings
    if settings.data_path or not settings.train_file:
        raise ConversionError(
            f"data_path={settings.data_path!r}, train_file={settings.train_file!r}: text needs"
            " train_file"
        )
    if settings.max_length > longest:
        raise ConversionError(
            f"max_length={settings.max_length}: expected at most max_position_embeddings={longest}"
        )
    if type(student).__name__ == "LionForMaskedLM" and tokenizer.mask_token is None:
        raise ConversionError(
            "the tokenizer has no mask token, which a masked language model needs"
        )
    if tokenizer.pad_token_id is None:
        raise ConversionError(
            "the tokenizer has no padding token, which the short texts of a batch need"
        )


class TextSamples:
    """Makes tokens of a row, with labels, or with masks and the masked tokens as labels.

    Args:
        tokenizer: the model's.
        settings: length, and share of masked tokens.
        masked: whether to mask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Distillation, masked: bool):
        self.tokenizer, self.max_length = tokenizer, settings.max_length
        self.mask = MaskTokens(tokenizer, settings.mask_probability) if masked else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        sentences = [row[name] for name in ("sentence1", "sentence2") if name in row]
        tokens = self.tokenizer(*sentences, truncation=True, max_length=self.max_length)
        names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
        prepared = {name: torch.tensor(tokens[name]) for name in names}
        if self.mask is not None:
            return self.mask(prepared)
        return prepared | {name: row[name] for name in row if name == "labels"}


class TextBatches:
    """Makes a batch of rows of tokens, with the labels of rows as a whole.

    Args:
        pad_token_id: what short rows are filled with.
        labelled: whether rows have a label; those of tokens are padded as the tokens are.
    """

    def __init__(self, pad_token_id: int, labelled: bool):
        self.pad_token_id, self.labelled = pad_token_id, labelled

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad_rows(rows, self.pad_token_id)
        if self.labelled and "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def _read(
    file: str, settings: Distillation, config: LionConfig, labelled: bool, notes: list[str]
) -> Sequence[dict[str, Any]]:
    """Rows with `sentence1`, perhaps `sentence2`, and `labels` if head and file have them.

    Labels that nobody asked for and that are not the model's are left out, with a note.
    """
    if Path(file).suffix.lower() == ".txt":
        return _lines(file)
    table = read_table(file)
    columns, label = _columns(table, file, settings)
    if labelled and label is not None:  # by the names of the model's classes, or their numbers
        count = config.num_labels
        classes = () if count == 1 else tuple(config.id2label[n] for n in range(count))
        try:
            return examples(table, file, TextColumns(columns, classes, label=label)).data
        except ValueError as error:
            if settings.label_column or settings.alpha < 1:
                raise
            check_columns(table, file, TextColumns(columns, ()), labelled=False)
            notes.append(f"the labels were not used: {error}.")
    rows = examples(table, file, TextColumns(columns, ()), labelled=False).data
    found = [row for row in rows if all(row.values())]
    if not found:
        raise ConversionError(f"{file}: every row of {list(columns)} is empty")
    return found


def _lines(file: str) -> list[dict[str, Any]]:
    if not Path(file).is_file():
        raise ConversionError(f"{file}: there is no such file")
    lines = [line.strip() for line in read_text(file).split("\n")]
    if not any(lines):
        raise ConversionError(f"{file}: holds no text")
    return [{"sentence1": line} for line in lines if line]


def _columns(table: Table, file: str, settings: Distillation) -> tuple[tuple[str, ...], str | None]:
    """The columns of text, and the column of labels or None."""
    names = table.column_names
    wanted = [settings.label_column or "", *LABEL_COLUMNS]
    label = next((name for name in wanted if name in names), None)
    if settings.label_column not in (None, label):
        raise ConversionError(
            f"label_column={settings.label_column!r} is not in {file}: its columns are {names}"
        )
    rest = [name for name in names if name != label]
    usual = next((found for found in SENTENCE_COLUMNS if set(found) <= {*names}), None)
    columns = settings.text_columns or usual or (rest if len(rest) == 1 else None)
    if not columns:
        raise ConversionError(
            f"text_columns: which of the columns {names} of {file} hold text is not plain; name"
            " them"
        )
    return tuple(columns), label
