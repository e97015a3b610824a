"""Files made to do harm: nothing in them runs, and nothing is left behind."""

import argparse
import json
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import IMAGE, Bomb, content_of, file_of, refused, saved
from support.hostile_files import archive
from support.models import image_config, model, text_config
from support.trainers import trainer
from transformers import AutoConfig, AutoModelForMaskedLM

import lion_hf
from lion_hf import hub
from lion_hf.auto import image_processor
from lion_hf.cli import main
from lion_hf.tasks.teacher import load_teacher
from lion_hf.tasks.text_classifier import build_classifier, load_config, load_tokenizer
from lion_hf.training import checkpoints
from lion_hf.training.settings import parse_mapping

ROOT = Path(__file__).parents[1]
SAFE_LOADERS = ("_Loader", "BaseLoader")  # the first is a SafeLoader, the second gives texts

# Files for `lion-hf convert`; those that cost too much are in tests/convert/test_hostile_files.py


@pytest.mark.slow
def test_tuples_that_are_shared_honestly_pass(tmp_path):
    content = content_of(IMAGE)
    betas = (0.9, 0.999)
    content["optimizer"] = {
        "param_groups": [{"betas": betas, "state": tuple(range(625))} for _ in range(1000)]
    }
    config = lion_hf.convert_checkpoint(
        saved(content, tmp_path / "file.pth"), tmp_path / "output"
    ).config
    assert config.image_size == 64


def test_a_namespace_may_hold_anything_and_does_nothing(tmp_path):
    (tmp_path / "outputs").mkdir()
    content = content_of(IMAGE)
    vars(content["args"]).update(
        {"__class__": "os.system", "__reduce__": "x", "input_size": "rm", "eval_crop_ratio": -1.0}
    )
    config = lion_hf.convert_checkpoint(
        saved(content, tmp_path / "file.pth"), tmp_path / "outputs" / "good"
    ).config
    assert config.image_size == 64  # the tensors tell
    made = tmp_path / "made"
    content["args"] = argparse.Namespace(order=Bomb(made))
    refused(saved(content, tmp_path / "bomb.pth"), tmp_path / "outputs" / "model", "mkdir")
    calls = pickle.dumps(argparse.FileType("w"), protocol=2)
    refused(
        archive(tmp_path / "type.pth", calls),
        tmp_path / "outputs" / "model",
        "holds argparse.FileType",
    )
    assert not made.exists()


def test_convert_writes_only_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(file_of(IMAGE)), "output"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output"]


# Folders of models


def code_of(folder: Path, made: Path, auto_class: str, model_type: str = "lion") -> Path:
    """A folder whose configuration points to its own code, which makes a file on import."""
    folder.mkdir()
    config = json.loads(text_config().to_json_string()) | {"model_type": model_type}
    names = {name: f"code.{name}" for name in ("AutoConfig", auto_class, "AutoTokenizer")}
    config["auto_map"] = {**names, "AutoTokenizer": ["code.A", "code.A"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "A", "auto_map": config["auto_map"]})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "code.A"}})
    )
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(made)!r}).touch()\nclass A: pass\nAutoConfig = A\n"
    )
    return folder


def test_code_beside_a_model_is_not_run(tmp_path, monkeypatch):
    from lion_hf.tasks import mlm

    monkeypatch.setattr(
        "builtins.input", lambda *_: "y"
    )  # whoever asks is told yes: nobody may ask
    made = tmp_path / "made"
    ours = code_of(tmp_path / "ours", made, "AutoModelForMaskedLM")
    other = code_of(tmp_path / "other", made, "AutoModelForMaskedLM", "unknown")
    settings = mlm.ModelSettings(model=str(ours), tokenizer=str(other))
    assert isinstance(
        load_config(str(ours), None, {}, 16), lion_hf.LionConfig
    )  # the installed classes win
    config = text_config()
    for attempt in (
        lambda: load_config(str(other), None, {}, 16),
        lambda: load_tokenizer(str(other), config),
        lambda: build_classifier(str(other), config, ["a"]),
        lambda: mlm.load_tokenizer(settings, None, "text", tmp_path, False),
        lambda: mlm.build_model(mlm.ModelSettings(model=str(other)), None),
        lambda: load_teacher(str(other), None, ["cat", "dog"], image_processor(32)),
        lambda: lion_hf.convert_checkpoint(
            file_of("text-lion-s-mlm"), tmp_path / "output", tokenizer=other
        ),
    ):
        with pytest.raises((ValueError, OSError, SystemExit)):
            attempt()
    assert not made.exists() and not (tmp_path / "output").exists()
    with pytest.raises(Exception):  # noqa: B017
        AutoConfig.from_pretrained(str(other), trust_remote_code=True)
    assert made.exists()  # the premise: it would have run


def test_a_pickle_as_weights_is_not_run(tmp_path):
    network = model("MaskedLM", text_config())
    network.config.save_pretrained(tmp_path / "folder")
    torch.save(
        {**network.state_dict(), "bomb": Bomb(tmp_path / "made")},
        tmp_path / "folder" / "pytorch_model.bin",
    )
    with pytest.raises(Exception, match="mkdir|Weights only|weights_only"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "folder")
    assert not (tmp_path / "made").exists()


HEADERS = {
    "a header of 2^62 bytes": lambda header: (2**62, header),
    "a header behind the end": lambda header: (10**6, header),
    "offsets behind the end": lambda header: (
        None,
        {"lion.norm": {**header["lion.norm"], "data_offsets": [0, 2**40]}},
    ),
    "a shape of 2^60": lambda header: (
        None,
        {"lion.norm": {**header["lion.norm"], "shape": [2**30, 2**30]}},
    ),
    "a product that overflows": lambda header: (
        None,
        {"lion.norm": {**header["lion.norm"], "shape": [2**62, 8]}},
    ),
    "negative": lambda header: (None, {"lion.norm": {**header["lion.norm"], "shape": [-24]}}),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_safetensors_that_lie(tmp_path, lie):
    text_config().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"lion.norm": torch.ones(24)}, file, metadata={"format": "pt"})
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    claimed, header = HEADERS[lie](json.loads(data[8 : 8 + size]))
    text = json.dumps(header).encode()
    file.write_bytes(
        struct.pack("<Q", len(text) if claimed is None else claimed) + text + data[8 + size :]
    )
    with pytest.raises(Exception, match="(?i)header|offset|invalid|overflow|deserializ"):
        lion_hf.LionForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"vocab_size": 1' + "0" * 5000 + "}", "\x00", ""]
)
def test_configurations_that_are_no_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError, RecursionError)):
        lion_hf.LionConfig.from_pretrained(tmp_path)


@pytest.mark.slow
def test_yaml_makes_no_objects(tmp_path):
    for text in (
        "a=!!python/object/apply:os.mkdir [made]",
        "{a: !!python/name:os.system }",
        "[" * 5000,
        "{" * 5000,
    ):
        with pytest.raises(ValueError, match="expected name=value"):
            parse_mapping(text)
    calls = [
        path
        for path in (ROOT / "lion_hf").rglob("*.py")
        for loader in re.findall(r"yaml\.load\(.*?(\w+)\)", path.read_text(encoding="utf-8"))
        if loader not in SAFE_LOADERS
    ]
    assert not calls and not (tmp_path / "made").exists()


# Checkpoints of runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_run_continues_from_weights_only(tmp_path, name):
    trainer(tmp_path / "run", max_steps=2, save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    torch.save({"state": Bomb(tmp_path / "made")}, checkpoint / name)
    checkpoints.seal(checkpoint)  # so that the file itself counts as whole
    assert checkpoints.find_checkpoint(tmp_path / "run") == checkpoint
    with pytest.raises(pickle.UnpicklingError, match="(?s)weights_only.*mkdir"):
        trainer(tmp_path / "run", max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "made").exists()


def test_no_file_is_loaded_with_its_code():
    sources = [
        *(ROOT / "lion_hf").rglob("*.py"),
        *(ROOT / "run_scripts").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]
    assert len(sources) > 30
    for source in sources:
        text = source.read_text(encoding="utf-8")
        for word in (
            "pickle.load",
            "weights_only=False",
            "trust_remote_code=True)",
            "yaml.unsafe",
            "extractall",
        ):
            assert word not in text, f"{source.name}: {word}"
        assert not re.search(r"(?<![\w.])(eval|exec)\(", text), source.name
        assert text.count("torch.load(") == text.count("weights_only=True"), source.name


# What is published


def test_the_bundle_holds_code_weights_and_card_only(tmp_path, monkeypatch):
    code = tmp_path / "code"
    shutil.copytree(hub.CODE, code)
    (code / "__pycache__").mkdir(exist_ok=True)
    for name in (".env", "optimizer.pt", "notes.txt", "__pycache__/lion_ops.cpython-311.pyc"):
        (code / name).write_text("secret")
    monkeypatch.setattr(hub, "CODE", code)
    folder = hub.save_for_hub(model("ImageClassification", image_config()), tmp_path / "folder")
    sources = {path.name for path in (ROOT / "lion_hf" / "modeling").glob("*.py")} - {"__init__.py"}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert found == sources | {"config.json", "model.safetensors", "README.md"}


@pytest.mark.slow
def test_what_a_run_leaves_is_not_published(tmp_path):
    folder = hub.save_for_hub(model("Model", text_config()), tmp_path / "folder")
    published = hub.files_to_publish(folder, "someone/lion").keys()
    trainer(folder, max_steps=1, save_steps=1).train()
    left = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    } - published
    assert "checkpoint-1/optimizer.pt" in left  # the premise
    for name in (
        ".env",
        "runs/events.out.tfevents.1.host.2",
        "training_args.bin",
        "old/rng_state_0.pth",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    assert hub.files_to_publish(folder, "someone/lion").keys() == published
