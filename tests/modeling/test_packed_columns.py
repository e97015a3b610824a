"""Columns of a data set that tell of packing reach every head through a plain Trainer."""

import inspect

import pytest
import torch
from datasets import Dataset
from support.models import TEXT_HEADS, model, text_config, token_ids
from transformers import Trainer, TrainingArguments

import lion_hf

LENGTHS = (5, 1, 6)  # of the documents in a row
ROWS, LENGTH = 3, sum(LENGTHS)
OFFSETS = [0, 5, 6, 12]
PACKING = {
    "position_ids": {"position_ids": [*range(5), *range(1), *range(6)]},
    "seq_idx": {"seq_idx": [7] * 5 + [1] + [2] * 6},
    "cu_seq_lens": {
        "cu_seq_lens_q": OFFSETS,
        "cu_seq_lens_k": OFFSETS,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    },
}
NAMED = (
    "position_ids",
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


def labels_of(head: str, input_ids: torch.Tensor) -> dict:
    if head in ("MaskedLM", "TokenClassification"):
        return {"labels": (input_ids % 3).tolist()}
    if head == "QuestionAnswering":
        return {"start_positions": [6] * ROWS, "end_positions": [9] * ROWS}
    return {"labels": [0, 1, 2]}


def evaluated(network, columns: dict, folder) -> float:
    """Trainer's loss with its defaults, which drop the columns that a head does not name."""
    arguments = TrainingArguments(folder, report_to=[], disable_tqdm=True, use_cpu=True)
    assert arguments.remove_unused_columns, "the premise"
    return Trainer(network, arguments, eval_dataset=Dataset.from_dict(columns)).evaluate()[
        "eval_loss"
    ]


@pytest.mark.parametrize("head", ("Model", *TEXT_HEADS))
def test_every_head_names_what_tells_of_packing(head):
    """Trainer and others read the signature; a packing of transformers' collators is in there."""
    kind = lion_hf.LionModel if head == "Model" else getattr(lion_hf, f"LionFor{head}")
    assert set(NAMED) <= set(inspect.signature(kind.forward).parameters)


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("head", ("MaskedLM", "TokenClassification", "QuestionAnswering"))
def test_documents_stay_apart_in_a_plain_trainer(head, packing, tmp_path):
    network = model(head, text_config())
    input_ids = token_ids(ROWS, LENGTH)
    columns = {"input_ids": input_ids.tolist(), **labels_of(head, input_ids)}
    told = {name: [value] * ROWS for name, value in PACKING[packing].items()}
    loss = evaluated(network, columns | told, tmp_path)
    labels = {name: torch.tensor(value) for name, value in columns.items() if name != "input_ids"}
    with torch.no_grad():
        if head == "QuestionAnswering":  # one answer per row: each token sees its document alone
            documents = torch.tensor([PACKING["seq_idx"]["seq_idx"]] * ROWS)
            expected = network(input_ids, seq_idx=documents, **labels).loss
        else:
            pieces = zip(input_ids.split(LENGTHS, 1), labels["labels"].split(LENGTHS, 1))
            losses = [network(ids, labels=some).loss * some.numel() for ids, some in pieces]
            expected = sum(losses) / input_ids.numel()
        leaking = network(input_ids, **labels).loss
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert abs(leaking - expected) > 1e-3, "the premise: without the columns documents leak"


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("head", ("SequenceClassification", "MultipleChoice"))
def test_heads_that_pool_one_document_refuse_several(head, packing, tmp_path):
    network, choices = model(head, text_config()), 4
    several = head == "MultipleChoice"
    input_ids = token_ids(ROWS * (choices if several else 1), LENGTH)
    input_ids = input_ids.view(ROWS, choices, LENGTH) if several else input_ids
    columns = {"input_ids": input_ids.tolist(), **labels_of(head, input_ids)}
    told = {}
    for name, value in PACKING[packing].items():
        rows = [value] * choices if several and name in ("position_ids", "seq_idx") else value
        told[name] = [rows] * ROWS
    with pytest.raises(
        ValueError, match="it pools one document per row; pad the documents instead"
    ):
        evaluated(network, columns | told, tmp_path)
    one_document = evaluated(network, columns, tmp_path)
    if packing != "cu_seq_lens":  # a row that holds one document is what they are made for
        value = list(range(LENGTH)) if packing == "position_ids" else [3] * LENGTH
        told = {packing: [[value] * choices if several else value] * ROWS}
        loss = evaluated(network, columns | told, tmp_path)
        assert loss == pytest.approx(one_document, abs=1e-5)


def test_offsets_for_every_row():
    """Rows of their own documents; where a row has fewer, its last offset is repeated."""
    network = model("MaskedLM", text_config())
    input_ids = token_ids(2, LENGTH)
    offsets = torch.tensor([OFFSETS, [0, 7, 12, 12]], dtype=torch.int32)
    packed = network(input_ids, cu_seq_lens_q=offsets).logits
    for row, lengths in enumerate((LENGTHS, (7, 5))):
        pieces = input_ids[row : row + 1].split(lengths, 1)
        alone = torch.cat([network(ids).logits for ids in pieces], 1)
        torch.testing.assert_close(packed[row : row + 1], alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q .*: expected offsets"):
        network(input_ids, cu_seq_lens_q=offsets.flip(1))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q with a batch of 2 rows"):
        network(input_ids, cu_seq_lens_q=offsets[0])
