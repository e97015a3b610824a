"""Texts and images for distillation, labelled or not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from .data import MaskTokens, SeededDataset, pad_rows
from .distillation import Distillation
from .labelled_text import LABEL_COLUMNS, OWN, SENTENCE_COLUMNS, examples, own_task, read_table
from .modeling.configuration_lion import LionConfig
from .modeling.modeling_lion import LionPreTrainedModel
from .original import ConversionError

Parts = tuple[Dataset, Dataset | None, Callable[[list], dict[str, torch.Tensor]], list[str]]


def lesson_data(student: LionPreTrainedModel, processor: Any, settings: Distillation, seed: int) -> Parts:
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
        raise ConversionError(
            f"alpha={settings.alpha}: expected 1, because there are no labels that {_name(student)} learns from"
        )
    if validation is not None:
        count = min(len(validation), settings.validation_samples)
        validation = Subset(validation, [n * len(validation) // count for n in range(count)])  # folders are sorted by class
    return train, validation, collate, notes


def _name(student: LionPreTrainedModel) -> str:
    return type(student).__name__


def _texts(student: LionPreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Distillation, seed: int) -> Parts:
    config = student.config
    if settings.data_path or not settings.train_file:
        raise ConversionError(f"data_path={settings.data_path!r}, train_file={settings.train_file!r}: text needs train_file")
    if settings.max_length > config.max_position_embeddings:
        raise ConversionError(
            f"max_length={settings.max_length}: expected at most max_position_embeddings={config.max_position_embeddings}"
        )
    masked = _name(student) == "LionForMaskedLM"
    if masked and tokenizer.mask_token is None:
        raise ConversionError("the tokenizer has no mask token, which a masked language model needs")
    mask = MaskTokens(tokenizer, settings.mask_probability) if masked else None

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        texts = [row[name] for name in ("sentence1", "sentence2") if name in row]
        tokens = tokenizer(*texts, truncation=True, max_length=settings.max_length)
        prepared = {name: torch.tensor(tokens[name]) for name in ("input_ids", "token_type_ids") if name in tokens}
        return mask(prepared) if masked else prepared | {name: row[name] for name in row if name == "labels"}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad_rows(rows, tokenizer.pad_token_id)
        return batch | ({} if masked or "labels" not in rows[0] else {"labels": torch.tensor([row["labels"] for row in rows])})

    labelled = _name(student) == "LionForSequenceClassification" and config.problem_type != "multi_label_classification"
    parts = [
        None if file is None else SeededDataset(_read_text(file, settings, config, labelled), prepare, seed, vary=vary)
        for file, vary in ((settings.train_file, True), (settings.validation_file, False))
    ]
    return *parts, collate, []


def _read_text(file: str, settings: Distillation, config: LionConfig, labelled: bool) -> Any:
    """Rows with `sentence1`, perhaps `sentence2`, and where the head and the file have them `labels`."""
    if Path(file).suffix.lower() == ".txt":
        if not Path(file).is_file():
            raise ConversionError(f"{file}: there is no such file")
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ConversionError(f"{file}: holds no text")
        return [{"sentence1": line} for line in lines if line]
    data = read_table(file)
    label = next((name for name in [settings.label_column or ""] + list(LABEL_COLUMNS) if name in data.column_names), None)
    if settings.label_column not in (None, label):
        raise ConversionError(f"label_column={settings.label_column!r} is not in {file}: its columns are {data.column_names}")
    if labelled and label is not None:
        regression = config.num_labels == 1
        task = own_task(data, file, settings.text_columns, label, regression)
        if not regression:  # by the names of the model's classes, or their numbers
            task = replace(task, classes=tuple(config.id2label[n] for n in range(config.num_labels)), own=False)
        return examples(data, file, task).data
    columns = settings.text_columns or next((names for names in SENTENCE_COLUMNS if set(names) <= {*data.column_names}), None)
    if not columns:
        raise ConversionError(f"text_columns: which of the columns {data.column_names} of {file} hold text is not plain")
    return examples(data, file, replace(OWN, sentences=tuple(columns)), labelled=False).data


def _images(student: LionPreTrainedModel, processor: Any, settings: Distillation, seed: int) -> Parts:
    from .images import EvaluationTransform, read_images  # timm, which text does without

    train, validation = read_images(
        settings.data_path,
        train_file=settings.train_file,
        validation_file=settings.validation_file,
        image_column=settings.text_columns[0] if settings.text_columns else None,
        label_column=settings.label_column,
    )
    config, notes, numbers = student.config, [], None
    if _name(student) == "LionForImageClassification":
        numbers = [config.label2id.get(name) for name in train.names]
        if None in numbers:
            missing = train.names[numbers.index(None)]
            numbers = None
            notes.append(f"the data's classes are not the model's ({missing!r} is not among them): their labels were not used.")
    transform = EvaluationTransform(processor)
    patches = config.image_height_width[0] * config.image_height_width[1] // config.patch_size**2
    masked = _name(student) == "LionForMaskedImageModeling"

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        if numbers is not None:
            batch["labels"] = torch.tensor([numbers[row["labels"]] for row in rows])
        if masked:  # half of the patches, in the same places for the whole batch
            generator = torch.Generator().manual_seed(rows[0]["seed"])
            batch["bool_masked_pos"] = (torch.rand(1, patches, generator=generator) < 0.5).expand(len(rows), -1)
        return batch

    return SeededDataset(train, transform, seed), SeededDataset(validation, transform, seed, vary=False), collate, notes
