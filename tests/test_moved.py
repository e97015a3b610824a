"""Import paths of version 0.1: they still work, with a warning, and nothing of ours needs them."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from support.sources import ROOT, imports, tracked

from lion_hf.moved import LEFT, MOVED

# What a user of 0.1 is likeliest to import by its old path.
KNOWN = {
    "checkpoints": ["find_checkpoint"],
    "distillation": ["Distillation"],
    "distributed": ["start_processes"],
    "finished": ["begin", "finish"],
    "glue": ["TASKS", "GlueMetric", "summarize"],
    "image_trainer": ["ImageTrainer"],
    "images": ["Augmentation"],
    "labelled_text": ["read_glue", "read_table"],
    "lesson_data": ["lesson_data"],
    "modeling.lion_scan": ["PATCH_ORDERS", "snake_orders"],
    "original": ["ConversionError"],
    "settings": ["parse_settings", "save_settings"],
    "streaming": ["TextStream", "StreamingTrainer"],
    "text_classifier": ["load_config"],
    "trainer": ["LionTrainer", "LionTrainingArguments"],
}
CODE = """
import importlib, json, sys, warnings
import lion_hf
from lion_hf.moved import LEFT, MOVED

found = {}
for old, homes in MOVED.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(f"lion_hf.{old}")
    told = [str(w.message) for w in caught if w.category is DeprecationWarning]
    new = [importlib.import_module(f"lion_hf.{home}") for home in homes]
    names = [(home, name) for home in new for name in vars(home) if not name.startswith("_")]
    other = [name for home, name in names if not any(
        getattr(module, name, None) is getattr(another, name, 0) for another in new)]
    found[old] = {"told": told, "names": sorted({name for _, name in names}), "other": other}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    """What a process sees that imports every old path."""
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_warns_and_gives_the_same_objects(old, found):
    told = [text for text in found[old]["told"] if text.startswith(f"lion_hf.{old} has moved to ")]
    assert len(told) == 1
    assert all(f"lion_hf.{home}" in told[0] for home in MOVED[old])
    assert found[old]["names"] and not found[old]["other"]


@pytest.mark.slow
@pytest.mark.parametrize("old", KNOWN)
def test_an_old_path_has_its_known_names(old, found):
    assert set(KNOWN[old]) <= set(found[old]["names"])


@pytest.mark.parametrize("file", tracked("*.py"))
def test_no_file_imports_an_old_path(file):
    assert not imports(file) & {f"lion_hf.{old}" for old in MOVED}


@pytest.mark.parametrize("file", tracked("*.md"))
def test_no_page_shows_an_old_path(file):
    if file == "CHANGELOG.md":  # it lists them
        return
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not re.findall(rf"\blion_hf\.(?:{'|'.join(MOVED)})\b", text)


def test_other_names_are_not_found():
    with pytest.raises(ModuleNotFoundError, match="lion_hf.nothing"):
        __import__("lion_hf.nothing")


def test_the_changelog_lists_every_old_path():
    rows = {
        f"| `lion_hf.{old}` | {', '.join(f'`lion_hf.{home}`' for home in homes)} |"
        for old, homes in MOVED.items()
    }
    assert rows <= set((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    "old, home, name",
    [
        ("auto", "folders", "has_weights"),
        ("convert", "convert.names", "NAMES"),
        ("data", "data.packing", "LONGEST_ROW"),
        ("hub", "folders", "new_folder"),
        ("linearize", "linearize.softmax_models", "check_softmax_config"),
        ("modeling.lion_checks", "modeling.lion_numerics", "in_transform"),
        ("modeling.lion_chunkwise", "modeling.lion_choice", "default_chunk_size"),
        ("modeling.lion_naive", "modeling.lion_numerics", "full_precision"),
        ("modeling.lion_ops", "modeling.lion_choice", "explain"),
        ("modeling.modeling_lion", "modeling.lion_layers", "LionLayer"),
        ("training", "training.run", "METRICS_FILE"),
    ],
)
def test_names_that_left_a_module_are_found_with_a_warning(old, home, name):
    module, new = (importlib.import_module(f"lion_hf.{path}") for path in (old, home))
    with pytest.warns(
        DeprecationWarning, match=f"lion_hf.{old}.{name} has moved to lion_hf.{home}"
    ):
        assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError, match=f"'lion_hf.{old}' has no attribute 'ghost'"):
        module.ghost  # noqa: B018


def test_every_module_that_names_left_is_tested():
    cases = test_names_that_left_a_module_are_found_with_a_warning.pytestmark[0].args[1]
    assert {old for old, _, _ in cases} == set(LEFT)
