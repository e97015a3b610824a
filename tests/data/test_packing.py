"""The collator of packed rows: nothing is lost, and the model sees each document alone."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import model, text_config
from transformers import BertTokenizer, TrainingArguments

import lion_hf
from lion_hf.data.packing import pack

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(
        vocab={word: number for number, word in enumerate((*SPECIAL, *map(str, range(94))))}
    )


def documents(*lengths: int) -> list[dict]:
    """Documents as a tokenizer makes them: [CLS] words [SEP]."""
    return [
        {"input_ids": [2, *torch.randint(5, 99, (length - 2,)).tolist(), 3]} for length in lengths
    ]


def packing(tokenizer, row_length=16, **kwargs):
    return lion_hf.DataCollatorForPackedLanguageModeling(tokenizer, row_length=row_length, **kwargs)


@given(lengths=st.lists(st.integers(1, 20), max_size=40), extra=st.integers(0, 10))
def test_packing_keeps_every_document_once_and_fills_rows(lengths, extra):
    row_length = max(lengths, default=1) + extra
    rows = pack(lengths, row_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < n <= row_length for n in filled)
    assert all(
        a + b > row_length for n, a in enumerate(filled) for b in filled[n + 1 :]
    )  # no two rows would fit into one


def test_batch(tokenizer):
    """Every document is in one piece, with its own number; only masked words have labels."""
    examples = documents(16, 9, 7, 6, 4, 3)
    batch = packing(tokenizer, mlm_probability=0.5)(examples)
    assert {name: tuple(x.shape) for name, x in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask", "seq_idx"), (3, 16)
    )
    original = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    found = [
        original[
            row, (batch["seq_idx"][row] == number) & (batch["attention_mask"][row] == 1)
        ].tolist()
        for row in range(3)
        for number in batch["seq_idx"][row].unique()
    ]
    assert sorted(found) == sorted(example["input_ids"] for example in examples)
    assert (original[batch["attention_mask"] == 0] == 0).all()
    masked = batch["labels"] != -100
    assert (original[masked] >= len(SPECIAL)).all() and 0.2 < masked.sum() / 33 < 0.8
    assert (batch["input_ids"][masked] == tokenizer.mask_token_id).float().mean() > 0.5


def test_token_types_are_packed_too(tokenizer):
    examples = [example | {"token_type_ids": [0] * 4 + [1] * 2} for example in documents(6, 6)]
    batch = packing(tokenizer)(examples)
    assert batch["token_type_ids"].tolist() == [[0] * 4 + [1] * 2 + [0] * 4 + [1] * 2 + [0] * 4]


def test_padding_is_left_out(tokenizer):
    """Documents that were tokenised with padding="max_length"."""
    padded = [
        {"input_ids": [2, 7, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": torch.tensor([2, 8, 9, 3])},
    ]
    batch = packing(tokenizer, row_length=8, mlm_probability=0.0)(padded)
    assert batch["input_ids"].tolist() == [[2, 8, 9, 3, 2, 7, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7 + [0]]


@pytest.mark.parametrize(
    "examples, message",
    [
        ([], "an empty list of documents"),
        (
            [{"input_ids": [2, 3], "token_type_ids": [0, 0]}, {"input_ids": [2, 3]}],
            "document 1 of the batch has no token_type_ids",
        ),
        (
            [{"input_ids": [2, 3], "token_type_ids": [0]}],
            "document 0 of the batch has columns of shapes [(2,), (1,)]",
        ),
        ([{"words": [2]}], "document 0 of the batch has no input_ids"),
    ],
)
def test_wrong_documents(examples, message, tokenizer):
    with pytest.raises(ValueError, match=re.escape(message)):
        packing(tokenizer)(examples)


def test_other_tensors_are_refused(tokenizer):
    with pytest.raises(ValueError, match="packed rows are made with 'pt' only"):
        packing(tokenizer)(documents(4), return_tensors="np")


def test_seed(tokenizer):
    examples = documents(12, 12, 4)
    first, second = (packing(tokenizer, seed=3)(examples) for _ in range(2))
    assert torch.equal(first["input_ids"], second["input_ids"]) and torch.equal(
        first["labels"], second["labels"]
    )
    assert not torch.equal(first["labels"], packing(tokenizer, seed=4)(examples)["labels"])


@pytest.mark.parametrize("form", ("auto", "attention", "chunk", "recurrent"))
@pytest.mark.parametrize("mask_type", ("lit", "decay", "selective"))
def test_the_model_sees_each_document_alone(mask_type, form, tokenizer):
    network = model("MaskedLM", text_config(mask_type, attention_form=form))
    batch = packing(tokenizer)(documents(9, 6, 8, 3))
    logits = network(**batch).logits
    for row in range(len(logits)):
        for number in batch["seq_idx"][row].unique():
            here = (batch["seq_idx"][row] == number) & (batch["attention_mask"][row] == 1)
            alone = network(batch["input_ids"][row, here][None]).logits[0]
            torch.testing.assert_close(logits[row, here], alone, atol=1e-5, rtol=1e-5)


def test_training_with_packed_rows(tokenizer, tmp_path):
    """Trainer passes `seq_idx` on, and a model learns; with sparse prediction too."""
    rows = [
        {"input_ids": [2, *[5 + n % 3] * (3 + n % 5), 3]} for n in range(64)
    ]  # a word, repeated: easily filled in
    losses = {}
    for sparse in (False, True):
        network = model("MaskedLM", text_config(sparse_prediction=sparse)).train()
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=16,
            max_steps=40,
            learning_rate=1e-2,
            logging_steps=10,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = lion_hf.LionTrainer(
            network, arguments, data_collator=packing(tokenizer, seed=0), train_dataset=rows
        )
        trainer.train()
        losses[sparse] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[sparse][-1] < 0.7 * losses[sparse][0]


@pytest.mark.parametrize(
    "lengths, message",
    [
        ((4, 17), "document 1 of the batch has 17 tokens: expected 1 to row_length=16"),
        ((0,), "document 0 of the batch has 0 tokens"),
    ],
)
def test_documents_that_do_not_fit(lengths, message, tokenizer):
    with pytest.raises(ValueError, match=re.escape(message)):
        packing(tokenizer)([{"input_ids": [5] * length} for length in lengths])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"row_length": 0}, "row_length=0: expected an integer of at least 1"),
        ({"row_length": 1.5}, "row_length=1.5: expected an integer"),
        ({"row_length": 10**30}, "expected an integer of at least 1 (and at most 2147483647)"),
        (
            {"mask_replace_prob": float("nan")},
            "mask_replace_prob=nan: expected a probability in [0, 1]",
        ),
        ({"seed": 1.5}, "seed=1.5: expected None or an integer"),
        ({"mlm": False}, "mlm=False: packed rows are made with True only"),
        (
            {"whole_word_mask": True, "mask_replace_prob": 1, "random_replace_prob": 0},
            "whole_word_mask=True: packed rows are made with False only",
        ),
        ({"mlm_probability": 1.5}, "mlm_probability=1.5: expected a probability in [0, 1]"),
    ],
)
def test_wrong_options(options, message, tokenizer):
    with pytest.raises(ValueError, match=re.escape(message)):
        packing(tokenizer, **options)


def test_tokenizer_without_padding():
    words = BertTokenizer(vocab={word: number for number, word in enumerate(SPECIAL)})
    words.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        packing(words)
