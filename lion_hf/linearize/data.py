"""Texts and images for distillation, labelled or not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
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
from ..modeling.configuration_lion import LionConfig
from ..modeling.modeling_lion import LionPreTrainedModel
from .distillation import problem_type
from .settings import Distillation

Parts = tuple[Any, Any, Callable[[list], dict[str, torch.Tensor]], list[str]]


def lesson_data(
    student: LionPreTrainedModel, processor: Any, settings: Distillation, seed: int
) -> Parts:
    """Training data, validation data or None, what makes batches of them, and notes.

    Args:
        student: says which inputs and labels are wanted.
        processor: tokenizer or image processor.
        settings: files and columns.
        seed: of masks.

    Raises:
        ValueError: for data that are missing, cannot be read or do not fit the model.
    """
    find = _texts if student.config.modality == "text" else _images
    train, validation, collate, notes = find(student, processor, settings, seed)
    if settings.alpha < 1 and "labels" not in collate([train[0]]):
        reason = "".join(f" ({note.rstrip('.')})" for note in notes)
        raise ConversionError(
            f"alpha={settings.alpha}: expected 1, because there are no labels that {_name(student)} learns from{reason}"
        )
    if validation is not None:
        count = min(len(validation), settings.validation_samples)
        validation = Subset(
            validation, [n * len(validation) // count for n in range(count)]
        )  # folders are sorted by class
    return train, validation, collate, notes


def _name(student: LionPreTrainedModel) -> str:
    return type(student).__name__


def _texts(
    student: LionPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Distillation,
    seed: int,
) -> Parts:
    config = student.config
    if settings.data_path or not settings.train_file:
        raise ConversionError(
            f"data_path={settings.data_path!r}, train_file={settings.train_file!r}: text needs train_file"
        )
    if settings.max_length > config.max_position_embeddings:
        raise ConversionError(
            f"max_length={settings.max_length}: expected at most max_position_embeddings={config.max_position_embeddings}"
        )
    masked = _name(student) == "LionForMaskedLM"
    if masked and tokenizer.mask_token is None:
        raise ConversionError(
            "the tokenizer has no mask token, which a masked language model needs"
        )
    if tokenizer.pad_token_id is None:
        raise ConversionError(
            "the tokenizer has no padding token, which the short texts of a batch need"
        )
    mask = MaskTokens(tokenizer, settings.mask_probability) if masked else None

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        texts = [row[name] for name in ("sentence1", "sentence2") if name in row]
        tokens = tokenizer(*texts, truncation=True, max_length=settings.max_length)
        prepared = {
            name: torch.tensor(tokens[name])
            for name in ("input_ids", "token_type_ids")
            if name in tokens
        }
        return (
            mask(prepared)
            if mask is not None
            else prepared | {name: row[name] for name in row if name == "labels"}
        )

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad_rows(rows, tokenizer.pad_token_id)
        return batch | (
            {}
            if masked or "labels" not in rows[0]
            else {"labels": torch.tensor([row["labels"] for row in rows])}
        )

    kind = problem_type(student)
    labelled = _name(student) == "LionForSequenceClassification" and (
        kind == "single_label_classification" or (kind == "regression" and config.num_labels == 1)
    )
    parts: list[SeededDataset | None] = []
    notes: list[str] = []
    for file, vary in ((settings.train_file, True), (settings.validation_file, False)):
        rows = None if file is None else _read_text(file, settings, config, labelled, notes)
        parts.append(None if rows is None else SeededDataset(rows, prepare, seed, vary=vary))
    train, validation = parts
    return train, validation, collate, notes


def _read_text(
    file: str, settings: Distillation, config: LionConfig, labelled: bool, notes: list[str]
) -> Any:
    """Rows with `sentence1`, perhaps `sentence2`, and where the head and the file have them `labels`.

    Labels that nobody asked for and that are not the model's are left out, with a note.
    """
    if Path(file).suffix.lower() == ".txt":
        if not Path(file).is_file():
            raise ConversionError(f"{file}: there is no such file")
        try:
            lines = [
                line.strip() for line in Path(file).read_text(encoding="utf-8-sig").split("\n")
            ]
        except UnicodeDecodeError as error:
            raise ConversionError(f"{file}: cannot be read as text: {error}") from error
        if not any(lines):
            raise ConversionError(f"{file}: holds no text")
        return [{"sentence1": line} for line in lines if line]
    data = read_table(file)
    label = next(
        (
            name
            for name in [settings.label_column or ""] + list(LABEL_COLUMNS)
            if name in data.column_names
        ),
        None,
    )
    if settings.label_column not in (None, label):
        raise ConversionError(
            f"label_column={settings.label_column!r} is not in {file}: its columns are {data.column_names}"
        )
    rest = [name for name in data.column_names if name != label]
    usual = next(
        (names for names in SENTENCE_COLUMNS if set(names) <= {*data.column_names}),
        rest if len(rest) == 1 else None,
    )
    columns = settings.text_columns or usual
    if not columns:
        raise ConversionError(
            f"text_columns: which of the columns {data.column_names} of {file} hold text is not plain"
        )
    task = TextColumns(sentences=tuple(columns), classes=())
    if labelled and label is not None:  # by the names of the model's classes, or their numbers
        classes = (
            ()
            if config.num_labels == 1
            else tuple(config.id2label[n] for n in range(config.num_labels))
        )
        try:
            return examples(data, file, replace(task, label=label, classes=classes)).data
        except ValueError as error:
            if settings.label_column or settings.alpha < 1:
                raise
            check_columns(data, file, task, labelled=False)
            notes.append(f"the labels were not used: {error}.")
    rows = [row for row in examples(data, file, task, labelled=False).data if all(row.values())]
    if not rows:
        raise ConversionError(f"{file}: every row of {list(columns)} is empty")
    return rows


def _images(
    student: LionPreTrainedModel, processor: Any, settings: Distillation, seed: int
) -> Parts:
    from ..data.augmentation import EvaluationTransform
    from ..data.images import read_images  # timm, which text does without

    train, validation = read_images(
        settings.data_path,
        train_file=settings.train_file,
        validation_file=settings.validation_file,
        image_column=settings.text_columns[0] if settings.text_columns else None,
        label_column=settings.label_column,
    )
    config, notes, numbers = student.config, [], None
    if config.num_channels != 3:
        raise ConversionError(
            f"num_channels={config.num_channels}: expected 3 for distillation, which reads images as RGB"
        )
    if (
        _name(student) == "LionForImageClassification"
        and problem_type(student) == "single_label_classification"
    ):
        known = {name: number for number, name in config.id2label.items()}
        if (
            set(train.names) <= {str(number) for number in config.id2label}
            and not set(train.names) & known.keys()
        ):
            known = {
                str(number): number for number in config.id2label
            }  # as tables without names have them
        numbers = [known.get(name) for name in train.names]
        if None in numbers:
            missing = train.names[numbers.index(None)]
            numbers = None
            notes.append(
                f"the data's classes are not the model's ({missing!r} is not among them): their labels were not used."
            )
    transform = EvaluationTransform(processor)
    patches = config.image_height_width[0] * config.image_height_width[1] // config.patch_size**2
    masked = _name(student) == "LionForMaskedImageModeling"

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        if numbers is not None:
            batch["labels"] = torch.tensor([numbers[row["labels"]] for row in rows])
        if masked:  # half of the patches, in the same places for the whole batch
            generator = torch.Generator().manual_seed(rows[0]["seed"])
            batch["bool_masked_pos"] = (torch.rand(1, patches, generator=generator) < 0.5).expand(
                len(rows), -1
            )
        return batch

    return (
        SeededDataset(train, transform, seed),
        SeededDataset(validation, transform, seed, vary=False),
        collate,
        notes,
    )
