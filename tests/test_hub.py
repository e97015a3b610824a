"""Folders for the Hub: they work without lion_hf and triton, their cards are right, and publishing asks first."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

import lion_hf
from lion_hf import hub
from lion_hf.auto import AUTO_MODELS, image_processor
from lion_hf.cli import main

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    ".",
    "the",
    "lion",
    "reads",
    "paris",
    "is",
    "of",
    "france",
    "it",
)
CASES = [
    (auto_name, modality) for auto_name, tags in hub.PIPELINE_TAGS.items() for modality in tags
]

# Runs where lion_hf and triton cannot be imported: loads every folder, runs it, and runs the example of its card.
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
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
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
others = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
report["from masked LM"] = [
    type(getattr(transformers, name).from_pretrained(encoder, trust_remote_code=True)).__name__ for name in others
]
report["imported"] = [name for name in sys.modules if name.partition(".")[0] in ("lion_hf", "triton")]
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
        assert found["module"].startswith("transformers_modules") and found["module"].endswith(
            "modeling_lion"
        )
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
        assert f"class {name}(" in (tmp_path / f"{file}.py").read_text()
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


@pytest.fixture
def api(monkeypatch) -> MagicMock:
    """A Hub that notes what it is asked."""
    api = MagicMock()
    api.upload_folder.return_value.commit_url = "https://hub.example/commit/1"
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    return api


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = hub.save_for_hub(
        build("AutoModel", "text"), tmp_path / "folder", repo_id="someone/lion"
    )
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("x")
    return folder


def answer(monkeypatch, text: str | None) -> None:
    """A terminal at which the user answers; None is no terminal."""
    monkeypatch.setattr(sys, "stdin", MagicMock(isatty=lambda: text is not None))
    monkeypatch.setattr("builtins.input", lambda question: text)


class TestPublish:
    def test_shows_files_and_sizes(self, folder, api, monkeypatch, capsys):
        answer(monkeypatch, "no")
        main(["publish", str(folder), "someone/lion", "--private"])
        printed = capsys.readouterr().out
        shown = dict(
            reversed(line.split()) for line in printed.splitlines() if len(line.split()) == 2
        )
        sizes = {
            file.name: f"{file.stat().st_size:,}" for file in folder.iterdir() if file.is_file()
        }
        assert shown == sizes and "model.safetensors" in shown
        assert (
            "secret" not in printed
            and "someone/lion, branch main, private" in printed
            and "note:" not in printed
        )

    @pytest.mark.parametrize("text", ["", "n", "no", "x"])
    def test_uploads_nothing_unless_told(self, folder, api, monkeypatch, text):
        answer(monkeypatch, text)
        assert main(["publish", str(folder), "someone/lion"]) == 1
        assert not api.method_calls

    @pytest.mark.parametrize("text", ["y", "Yes"])
    def test_uploads_what_it_showed(self, folder, api, monkeypatch, capsys, text):
        answer(monkeypatch, text)
        assert main(["publish", str(folder), "someone/lion"]) == 0
        api.create_branch.assert_not_called()
        sent = api.upload_folder.call_args.kwargs
        assert (sent["repo_id"], sent["folder_path"], sent["revision"]) == (
            "someone/lion",
            str(folder),
            None,
        )
        assert sent["ignore_patterns"] == hub.HIDDEN_FILES
        assert capsys.readouterr().out.endswith("https://hub.example/commit/1\n")

    def test_yes_asks_nothing(self, folder, api, monkeypatch):
        answer(monkeypatch, None)
        assert (
            main(["publish", str(folder), "someone/lion", "--yes", "--private", "--revision", "v1"])
            == 0
        )
        assert api.create_repo.call_args.kwargs == {"private": True, "exist_ok": True}
        api.create_branch.assert_called_once_with("someone/lion", branch="v1", exist_ok=True)
        assert api.upload_folder.call_args.kwargs["revision"] == "v1"

    def test_no_terminal_is_an_error(self, folder, api, monkeypatch, capsys):
        answer(monkeypatch, None)
        assert main(["publish", str(folder), "someone/lion"]) == 2
        assert re.fullmatch("error: .*--yes.*\n", capsys.readouterr().err)
        assert not api.method_calls

    def test_private_is_never_public(self, folder, api, capsys):
        api.repo_info.return_value.private = False
        assert main(["publish", str(folder), "someone/lion", "--private", "--yes"]) == 2
        assert "is public, so nothing was uploaded" in capsys.readouterr().err
        api.upload_folder.assert_not_called()

    def test_another_repository_than_in_the_card_is_told(self, folder, api, capsys):
        assert main(["publish", str(folder), "someone/other", "--yes"]) == 0
        assert (
            "note: the example in README.md does not load someone/other" in capsys.readouterr().out
        )

    @pytest.mark.parametrize(
        "name", ["config.json", "README.md", "modeling_lion.py", "model.safetensors"]
    )
    def test_incomplete_folder(self, folder, api, capsys, name):
        (folder / name).unlink()
        assert main(["publish", str(folder), "someone/lion", "--yes"]) == 2
        assert "lacks" in capsys.readouterr().err
        assert not api.method_calls

    @pytest.mark.parametrize("repo_id", ["a/b/c", "white space", ""])
    def test_bad_name(self, folder, api, capsys, repo_id):
        assert main(["publish", str(folder), repo_id, "--yes"]) == 2
        assert capsys.readouterr().err.startswith("error: ")
        assert not api.method_calls

    def test_failing_hub(self, folder, api, capsys):
        api.upload_folder.side_effect = RuntimeError("no route")
        assert main(["publish", str(folder), "someone/lion", "--yes"]) == 2
        assert "upload to someone/lion failed: no route" in capsys.readouterr().err
