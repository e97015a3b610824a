"""docs/api.md is what its script writes, and explains every public name and field."""

import importlib.util
from dataclasses import fields

import pytest
from support.pages import ROOT, text
from transformers import PreTrainedConfig

import lion_hf


@pytest.fixture
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(make_api):
    assert make_api.page() == text("docs/api.md"), "run `python docs/make_api.py`"


def test_every_name_and_field_is_explained(make_api):
    rows = dict(
        line.strip("| ").split(" | ", 1)
        for line in make_api.page().splitlines()
        if line.startswith("| `")
    )
    names = {row.strip("`").split("(")[0] for row in rows}
    own = {field.name for field in fields(lion_hf.LionConfig)} - {
        field.name for field in fields(PreTrainedConfig)
    }
    assert len(own) > 25 and own <= names and set(lion_hf.__all__) <= names
    assert all(len(said) > 3 for said in rows.values())


def test_a_description_of_nothing_is_refused(make_api, monkeypatch):
    monkeypatch.setattr(
        lion_hf.LionConfig,
        "__doc__",
        lion_hf.LionConfig.__doc__.replace("hidden_size: width", "width: width"),
    )
    with pytest.raises(ValueError, match="describes \\['width'\\], which are no fields"):
        make_api.page()
