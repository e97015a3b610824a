"""`lion-hf linearize` refuses hostile sources in seconds and little memory."""

import json

import pytest
import torch
from support.hostile_files import check_refusals, hostile_sources
from support.softmax_models import softmax_model

from lion_hf.convert.errors import ConversionError
from lion_hf.linearize.softmax_models import load_softmax_model
from lion_hf.linearize.sources import license_of


@pytest.mark.slow
def test_hostile_sources_are_refused_cheaply(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "place").mkdir()
    sources = hostile_sources(tmp_path / "files")
    check_refusals("linearize_checkpoint", sources, tmp_path / "place")


@pytest.mark.parametrize("size", ["vocab_size", "max_position_embeddings", "intermediate_size"])
def test_sizes_are_compared_with_the_weights_before_anything_is_built(tmp_path, size):
    softmax_model("BertForMaskedLM").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {size: 1_000_000}))
    with pytest.raises(ConversionError, match=r"parameters, but model.safetensors has room for"):
        load_softmax_model(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {size: 10**9}))
    with pytest.raises(ConversionError, match=f"{size}=1000000000: expected at most"):
        load_softmax_model(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = softmax_model("BertForMaskedLM")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=f"model.safetensors holds NaN or infinity in {name}"):
        load_softmax_model(tmp_path)


@pytest.mark.parametrize("kind", ["one file", "shards", "pickled", "pickled shards", "old pickle"])
def test_honest_weights_of_every_kind_are_read(tmp_path, kind):
    model = softmax_model("BertForMaskedLM")
    if "pickle" not in kind:
        model.save_pretrained(tmp_path, max_shard_size="20kB" if kind == "shards" else "1GB")
        assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (kind == "shards")
    else:
        model.config.save_pretrained(tmp_path)
        tensors = model.state_dict()
        if kind == "pickled shards":
            names = {name: f"pytorch_model-0000{n % 2}.bin" for n, name in enumerate(tensors)}
            for file in set(names.values()):
                part = {name: x for name, x in tensors.items() if names[name] == file}
                torch.save(part, tmp_path / file)
            (tmp_path / "pytorch_model.bin.index.json").write_text(
                json.dumps({"weight_map": names})
            )
        else:
            old = kind == "old pickle"
            torch.save(
                tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old
            )
    read = load_softmax_model(tmp_path)[0].state_dict()
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ('---\ntags: [a]\nlicense: "apache-2.0"\n---\nlicense: mit', "apache-2.0"),
        ("---\ntags: [a]\n---\nlicense: mit", None),
        ("no front matter\nlicense: mit", None),
        ("---\na: &a [x,x]\nb: &b [*a,*a]\nlicense: [*b,*b]\n---\n", None),
    ],
)
def test_the_licence_of_a_card(tmp_path, card, license):
    (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == license
