"""Folders for the Hub: they open without lion_hf and triton, and their model cards are right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.models import SPECIAL_TOKENS
from transformers import BertTokenizer

import lion_hf
from lion_hf import hub
from lion_hf.auto import AUTO_MODELS, image_processor

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
WORDS = (*SPECIAL_TOKENS, ".", "the", "lion", "reads", "paris", "is", "of", "france", "it")
CASES = [
    (auto_name, modality) for auto_name, tags in hub.PIPELINE_TAGS.items() for modality in tags
]

# Runs where lion_hf and triton cannot be imported: loads every folder, runs the model, and runs the
# example of its card.
CHILD = """
import contextlib, importlib.abc, io, json, os, re, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lion_hf", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch, transformers
from safetensors.torch import load_file, save_file

report = {}
for folder in sys.argv[1:]:
    auto_class = getattr(transformers, folder.split("-")[0])
    options = {"trust_remote_code": True, "output_loading_info": True}
    model, info = auto_class.from_pretrained(folder, **options)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**load_file(f"{folder}-inputs.safetensors"))
    outputs = {name: x.contiguous() for name, x in outputs.items() if x.dim()}
    save_file(outputs, f"{folder}-outputs.safetensors")
    example = re.search("```python\\n(.*?)```", open(f"{folder}/README.md").read(), re.DOTALL)[1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(example, {})
    report[folder] = {
        "module": type(model).__module__,
        "config": type(config).__module__,
        "faults": [name for name, value in info.items() if value],
        "printed": printed.getvalue(),
    }
encoder = "AutoModelForMaskedLM-text"
tasks = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
others = [transformers.AutoModel, *(getattr(transformers, f"AutoModelFor{task}") for task in tasks)]
report["from masked LM"] = [
    type(other.from_pretrained(encoder, trust_remote_code=True)).__name__ for other in others
]
blocked = ("lion_hf", "triton")
report["imported"] = [name for name in sys.modules if name.partition(".")[0] in blocked]
with open("report.json", "w") as file:
    json.dump(report, file)
"""


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


def build(auto_name: str, modality: str, **options) -> lion_hf.LionPreTrainedModel:
    options = (
        {"image_size": 32, "patch_size": 8, **options}
        if modality == "image"
        else {"vocab_size": len(WORDS), **options}
    )
    config = lion_hf.LionConfig(modality=modality, **SIZES, **options)
    return getattr(lion_hf, AUTO_MODELS[auto_name])(config).eval()


def build_inputs(auto_name: str, modality: str) -> dict[str, torch.Tensor]:
    if modality == "text":
        shape = (2, 3, 7) if auto_name == "AutoModelForMultipleChoice" else (2, 7)
        mask = torch.ones(shape, dtype=torch.long)
        mask[..., 5:] = 0
        return {"input_ids": torch.randint(len(WORDS), shape), "attention_mask": mask}
    inputs = {"pixel_values": torch.randn(2, 3, 32, 40)}
    return inputs | (
        {"bool_masked_pos": torch.rand(2, 20) < 0.5}
        if auto_name == "AutoModelForMaskedImageModeling"
        else {}
    )


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> tuple[Path, dict]:
    """A folder for every head, and what a process without lion_hf and triton found in them."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("elsewhere")
    names = []
    for auto_name, modality in CASES:
        names.append(f"{auto_name}-{modality}")
        processor = tokenizer() if modality == "text" else image_processor(32)
        model, inputs = build(auto_name, modality), build_inputs(auto_name, modality)
        hub.save_for_hub(model, place / names[-1], processing_class=processor)
        save_file(inputs, place / f"{names[-1]}-inputs.safetensors")
        with torch.no_grad():
            outputs = {name: x.contiguous() for name, x in model(**inputs).items() if x.dim()}
        save_file(outputs, place / f"{names[-1]}-expected.safetensors")
    # Without processor the example makes its own inputs.
    for auto_name, modality in CASES:
        names.append(f"{auto_name}-{modality}-bare")
        hub.save_for_hub(build(auto_name, modality), place / names[-1])
        save_file(build_inputs(auto_name, modality), place / f"{names[-1]}-inputs.safetensors")

    caches = {
        "HF_HOME": str(place / "home"),
        "HF_MODULES_CACHE": str(place / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-I", "-c", CHILD, *names]
    child = subprocess.run(
        command, cwd=place, env=os.environ | caches, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return place, json.loads((place / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("auto_name", "modality"), CASES)
class TestElsewhere:
    def test_code_comes_from_the_folder(self, elsewhere, auto_name, modality):
        report = elsewhere[1]
        found = report[f"{auto_name}-{modality}"]
        assert report["imported"] == []
        assert found["module"].startswith("transformers_modules")
        assert found["module"].endswith(("modeling_lion", "lion_encoder"))
        assert found["config"].startswith("transformers_modules") and found["config"].endswith(
            "configuration_lion"
        )
        assert found["faults"] == []

    def test_same_outputs(self, elsewhere, auto_name, modality):
        name = elsewhere[0] / f"{auto_name}-{modality}"
        expected, outputs = (
            load_file(f"{name}-expected.safetensors"),
            load_file(f"{name}-outputs.safetensors"),
        )
        assert expected.keys() == outputs.keys() and expected
        for key in expected:
            torch.testing.assert_close(
                outputs[key], expected[key], msg=lambda text, key=key: f"{key}: {text}"
            )

    @pytest.mark.parametrize(
        "processor", ["", "-bare"], ids=["with-processor", "without-processor"]
    )
    def test_example_of_the_card_runs(self, elsewhere, auto_name, modality, processor):
        assert elsewhere[1][f"{auto_name}-{modality}{processor}"]["printed"].strip()


@pytest.mark.slow
def test_other_heads_open_a_masked_lm_checkpoint(elsewhere):
    heads = [
        "LionModel",
        "LionForSequenceClassification",
        "LionForTokenClassification",
        "LionForQuestionAnswering",
    ]
    assert elsewhere[1]["from masked LM"] == heads


def test_every_head_has_a_task():
    assert hub.PIPELINE_TAGS.keys() == AUTO_MODELS.keys()


def test_auto_map_names_every_head_and_files_that_are_there(tmp_path):
    hub.save_for_hub(build("AutoModelForMaskedLM", "text"), tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", *AUTO_MODELS}
    for auto_name, reference in auto_map.items():
        file, name = reference.split(".")
        source = (tmp_path / f"{file}.py").read_text()
        assert f"class {name}(" in source or f"import {name}\n" in source
        assert name in (AUTO_MODELS.get(auto_name), "LionConfig")
    assert not (tmp_path / "__init__.py").exists()
    for file in tmp_path.glob("*.py"):
        for imported in re.findall(r"^\s*from \.(\w+) import", file.read_text(), re.MULTILINE):
            assert (tmp_path / f"{imported}.py").exists()


def test_model_stays_as_it_is(tmp_path):
    model = build("AutoModel", "text")
    model.config.auto_map = {"AutoModel": "mine.Mine"}
    hub.save_for_hub(model, tmp_path)
    assert model.config.auto_map == {"AutoModel": "mine.Mine"}
    assert (
        lion_hf.LionModel.from_pretrained(tmp_path)
        .config.auto_map["AutoModel"]
        .endswith("modeling_lion.LionModel")
    )


@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
def test_card(tmp_path, mask_type):
    model = build(
        "AutoModelForImageClassification",
        "image",
        mask_type=mask_type,
        patch_order="snake",
        num_labels=7,
    )
    hub.save_for_hub(
        model,
        tmp_path / "folder",
        processing_class=image_processor(32),
        repo_id="someone/lion-x",
        license="mit",
        dataset="ILSVRC/imagenet-1k",
        metrics={"accuracy": 0.799},
    )
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "mit",
        "transformers",
        "image-classification",
    )
    assert {"lion", f"lion-{mask_type}", "linear-attention", "custom_code"} <= set(data.tags)
    assert data.datasets == "ILSVRC/imagenet-1k" and data.model_name == "lion-x"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.799)
    assert (result.dataset_type, result.task_type) == ("ILSVRC/imagenet-1k", "image-classification")
    for loaded in ("AutoModelForImageClassification", "AutoImageProcessor"):
        assert f'= {loaded}.from_pretrained("someone/lion-x", trust_remote_code=True)' in card.text
    assert "| accuracy | 0.799 |" in card.text and "32 x 32" in card.text
    assert f"{model.num_parameters():,}" in card.text
    assert not re.search(r"\{[{%]|\bNone\b|Undefined|\n\n\n", card.text)


def test_card_of_text_without_metrics(tmp_path):
    hub.save_for_hub(
        build("AutoModelForMaskedLM", "text"),
        tmp_path,
        processing_class=tokenizer(),
        language=["en", "de"],
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.language == ["en", "de"] and card.data.pipeline_tag == "fill-mask"
    assert card.data.eval_results is None and "Results" not in card.text
    for loaded in ("AutoModelForMaskedLM", "AutoTokenizer"):
        assert f'= {loaded}.from_pretrained("{tmp_path.name}", trust_remote_code=True)' in card.text


def test_card_names_the_model_that_this_one_was_made_from(tmp_path):
    for folder, base_model in (("made", "someone/bert-x"), ("new", None)):
        hub.save_for_hub(build("AutoModel", "text"), tmp_path / folder, base_model=base_model)
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert card.data.base_model == base_model and ("base_model" in card.content) == (
            base_model is not None
        )


def test_metrics_need_a_data_set(tmp_path):
    with pytest.raises(ValueError, match="without dataset"):
        hub.save_for_hub(build("AutoModel", "text"), tmp_path / "new", metrics={"accuracy": 1.0})
    assert not (tmp_path / "new").exists()


def test_other_models_are_refused(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(vocab_size=9, **SIZES))
    with pytest.raises(ValueError, match=r"BertModel: expected one of \('LionModel'"):
        hub.save_for_hub(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


class TestLengthLimit:
    """A tokenizer is saved with the limit of its model."""

    @pytest.mark.parametrize(("mask_type", "limit"), [("lit", 16), ("selective", 1_000_000)])
    def test_save_for_hub(self, tmp_path, mask_type, limit):
        model = build(
            "AutoModelForMaskedLM", "text", mask_type=mask_type, max_position_embeddings=16
        )
        words = tokenizer()
        hub.save_for_hub(model, tmp_path, processing_class=words)
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert saved.model_max_length == limit
        assert words.model_max_length > 1e29  # the object itself is as it was
        inputs = saved("the lion " * 20, truncation=True, return_tensors="pt")
        assert inputs["input_ids"].shape[1] == min(limit, 42)
        assert model(**inputs).logits.isfinite().all()

    def test_a_lower_limit_stays(self, tmp_path):
        words = tokenizer()
        words.model_max_length = 8
        hub.save_for_hub(build("AutoModel", "text"), tmp_path, processing_class=words)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path).model_max_length == 8


class TestCardsOfLocalData:
    """Cards show no local paths; their metadata names only what can be on the Hub."""

    @pytest.mark.parametrize(
        ("dataset", "shown", "on_hub"),
        [
            ("nyu-mll/glue", "nyu-mll/glue", "nyu-mll/glue"),
            ("train.txt, more.txt", "train.txt, more.txt", None),
            ("/home/me/data/speeches", "speeches", "speeches"),
        ],
    )
    def test_dataset(self, tmp_path, dataset, shown, on_hub):
        model = build("AutoModel", "text")
        hub.save_for_hub(model, tmp_path, dataset=dataset, metrics={"accuracy": 1.0})
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.datasets == on_hub and f"On {shown}:" in card.text
        assert "/home/me" not in card.content

    def test_folder_as_dataset_and_base_model(self, tmp_path):
        (tmp_path / "bert").mkdir()
        folder = str(tmp_path / "bert")
        options = {"dataset": folder, "base_model": folder, "metrics": {"accuracy": 1.0}}
        hub.save_for_hub(build("AutoModel", "text"), tmp_path / "model", **options)
        card = ModelCard.load(tmp_path / "model" / "README.md")
        assert card.data.base_model is None and str(tmp_path) not in card.content
