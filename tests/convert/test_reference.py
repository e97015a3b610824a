"""Converted checkpoints give the original's logits and hidden states in every form."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lion_hf

CASES = sorted(path.parent for path in Path(__file__).parents[1].glob("reference/*/case.json"))
CHECKPOINTS = ("checkpoint.pth", "latest-rank0.pt")
AUTO_CLASSES = {
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
}
FORMS = {"attention": None, "recurrent": None, "chunk": 5}  # chunks of 5 divide none of the lengths
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def converted(request, tmp_path_factory):
    """A converted model, loaded by the Auto class, and the original's inputs and outputs."""
    case = json.loads((request.param / "case.json").read_text())
    (checkpoint,) = (
        request.param / name for name in CHECKPOINTS if (request.param / name).exists()
    )
    folder = tmp_path_factory.mktemp("converted") / request.param.name
    heads = case["num_heads"] if case.get("mask_type") == "Lit" else None
    lion_hf.convert_checkpoint(checkpoint, folder, num_attention_heads=heads)
    auto_class = getattr(
        transformers, AUTO_CLASSES.get(case.get("head"), "AutoModelForImageClassification")
    )
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), load_file(request.param / "expected.safetensors")


@pytest.fixture(params=FORMS)
def model_and_expected(request, converted):
    model, expected = converted
    model.config.attention_form, model.config.chunk_size = request.param, FORMS[request.param]
    return model, expected


def inputs_of(expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: expected[name]
        for name in ("pixel_values", "input_ids", "attention_mask", "token_type_ids")
        if name in expected
    }


def tokens_of(expected: dict[str, torch.Tensor]) -> torch.Tensor:
    """True for tokens, False for padding, whose rows the original computes wrongly."""
    if "attention_mask" in expected:
        return expected["attention_mask"].bool()
    return torch.ones(expected["hidden_states.0"].shape[:2], dtype=torch.bool)


def compare(outputs, expected: dict[str, torch.Tensor]) -> None:
    tokens = tokens_of(expected)
    per_token = outputs.logits.dim() == 3
    logits = (outputs.logits, expected["logits"])
    torch.testing.assert_close(*(x[tokens] if per_token else x for x in logits), **TOLERANCE)
    states = {"last_hidden_state": outputs.hidden_states[-1]}
    states |= {f"hidden_states.{n}": state for n, state in enumerate(outputs.hidden_states)}
    compared = states.keys() & expected.keys()
    assert compared
    for name in compared:
        torch.testing.assert_close(states[name][tokens], expected[name][tokens], **TOLERANCE)


def test_all_cases_are_here():
    assert len(CASES) == 15


def test_batch(model_and_expected):
    model, expected = model_and_expected
    inputs = inputs_of(expected)
    assert len(next(iter(inputs.values()))) > 1
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    compare(outputs, expected)


def test_rows_alone_and_without_mask(model_and_expected):
    model, expected = model_and_expected
    for row in range(len(expected["logits"])):
        one = {
            name: x[row : row + 1]
            for name, x in expected.items()
            if not name.endswith("without_mask")
        }
        with torch.no_grad():
            outputs = model(**inputs_of(one), output_hidden_states=True)
        compare(outputs, one)
    if "input_ids" in expected:
        with torch.no_grad():
            logits = model(
                input_ids=expected["input_ids"][:1], token_type_ids=expected["token_type_ids"][:1]
            ).logits
        torch.testing.assert_close(logits, expected["logits.first_row_without_mask"], **TOLERANCE)
