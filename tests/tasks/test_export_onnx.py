"""`lion-hf export`: ONNX files that give what torch gives, of every family and head."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.models import image_config, model, text_config, token_ids
from transformers import BertConfig, BertModel, BertTokenizer

from lion_hf import cli
from lion_hf.tasks import export
from lion_hf.tasks.export import INT8_FILE, MODEL_FILE, export_onnx

MODERN = {"pre_norm": True, "conv_kernel_size": 3, "gated_mlp": True}
SMALL = {"num_hidden_layers": 1, "chunk_size": None, "max_position_embeddings": 200}
# Every family, block and head at least once.
CASES = {
    "Model, modern S": ("Model", text_config("selective", **SMALL, **MODERN)),
    "Model, D, one token type": ("Model", text_config("decay", type_vocab_size=1, **SMALL)),
    "Model, images": ("Model", image_config("decay", num_hidden_layers=1, **MODERN)),
    "MaskedLM, lit": ("MaskedLM", text_config("lit", use_position_embeddings=True, **SMALL)),
    "MaskedLM, modern lit": ("MaskedLM", text_config("lit", **SMALL, **MODERN)),
    "SequenceClassification, modern D": (
        "SequenceClassification",
        text_config("decay", feature_map="exponential", **SMALL, **MODERN),
    ),
    "TokenClassification, S": ("TokenClassification", text_config("selective", **SMALL)),
    "QuestionAnswering, S": ("QuestionAnswering", text_config("selective", **SMALL)),
    "ImageClassification, snake S": (
        "ImageClassification",
        image_config("selective", "snake", num_hidden_layers=1, use_position_embeddings=True),
    ),
}
QUICK = "SequenceClassification, modern D"


def save(name: str, folder: Path) -> torch.nn.Module:
    head, config = CASES[name]
    network = model(head, config)
    network.save_pretrained(folder)
    return network


def batch(config, rows: int, length: int, padding: int = 0, side: str = "right") -> dict:
    """Texts with padding in the first row, or images of `length` x 2 * `length` pixels."""
    if config.modality == "image":
        return {"pixel_values": torch.randn(rows, 3, length, 2 * length)}
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, slice(length - padding, None) if side == "right" else slice(padding)] = 0
    types = torch.randint(config.type_vocab_size, (rows, length))
    return {"input_ids": token_ids(rows, length), "attention_mask": mask, "token_type_ids": types}


def compare(file: Path, network: torch.nn.Module, inputs: dict, atol: float = 1e-4) -> float:
    """Checks all outputs at tokens, and returns the largest difference."""
    session, largest = onnxruntime.InferenceSession(file), 0.0
    given = {x.name: inputs[x.name].numpy() for x in session.get_inputs()}
    with torch.no_grad():
        expected = network(**inputs)
    assert [x.name for x in session.get_outputs()] == list(expected)
    for found, wanted in zip(session.run(None, given), expected.values()):
        found, mask = torch.from_numpy(found), inputs.get("attention_mask")
        assert found.shape == wanted.shape
        if mask is not None and wanted.shape[:2] == mask.shape:
            found, wanted = found[mask.bool()], wanted[mask.bool()]
        assert wanted.numel() == 1 or wanted.std() > 1e-3
        largest = max(largest, (found - wanted).abs().max().item() / wanted.abs().max().item())
    assert largest < atol
    return largest


def check_integers(file: Path) -> None:
    """Checks that all matrices of 24 columns and more are integers, and that the gates are not."""
    graph = onnx.load(file).graph
    kinds = {x.name: (x.data_type, list(x.dims)) for x in graph.initializer}
    matrices = [(kind, dims) for kind, dims in kinds.values() if len(dims) == 2]
    floats = [dims for kind, dims in matrices if kind == onnx.TensorProto.FLOAT]
    assert [24, 3] in floats and not [dims for dims in floats if min(dims) >= 24]
    assert sum(kind == onnx.TensorProto.INT8 for kind, _ in matrices) >= 6


SIZES = [(1, 1), (2, 9, 3, "left"), (3, 64, 10, "right"), (2, 150, 70, "left"), (1, 200)]
SIDES = [(1, 4), (3, 8), (1, 24)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_file_serves_every_batch_length_and_padding(name, tmp_path):
    network = save(name, tmp_path / "model")
    made = export_onnx(tmp_path / "model", tmp_path / "out")
    assert made.architecture == type(network).__name__ and [x.name for x in made.files] == [
        MODEL_FILE
    ]
    assert 0 < made.files[0].difference < 1e-5 and made.files[0].megabytes > 0.001
    for size in SIDES if network.config.modality == "image" else SIZES:
        compare(tmp_path / "out" / MODEL_FILE, network, batch(network.config, *size))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    types = "token_type_ids" in {
        x.name for x in onnxruntime.InferenceSession(tmp_path / "out" / MODEL_FILE).get_inputs()
    }
    assert types == (network.config.modality == "text" and network.config.type_vocab_size > 1)


@pytest.mark.slow
def test_the_command_prints_difference_size_and_time(tmp_path, capsys):
    """With integers of 8 bits, in a folder of sentence-transformers, which finds the file."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.backend.utils import backend_should_export
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    network = save("Model, modern S", tmp_path / "model")
    words = {f"w{n}": n for n in range(5, 99)}
    special = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    BertTokenizer(vocab=special | words).save_pretrained(tmp_path / "model")
    modules = [Transformer(str(tmp_path / "model")), Pooling(24, "mean"), Normalize()]
    encoder = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    encoder.save(str(tmp_path / "encoder"))

    out = tmp_path / "out"
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "encoder"), str(out), "--onnx", "--int8"]) == 0
    first, whole, small = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}: LionModel, mask_type=selective, ") and first.endswith(" s")
    assert MODEL_FILE in whole and " MB, differs from torch by at most " in whole
    assert INT8_FILE in small

    inputs = batch(network.config, 2, 30, 7, "left")
    compare(out / MODEL_FILE, network, inputs)
    assert compare(out / INT8_FILE, network, inputs, atol=0.2) > 1e-4
    check_integers(out / INT8_FILE)
    assert b"site-packages" not in (out / MODEL_FILE).read_bytes(), "paths of this machine"
    assert [x["type"] for x in json.loads((out / "modules.json").read_text())] == [
        x["type"] for x in json.loads((tmp_path / "encoder" / "modules.json").read_text())
    ]
    exports, options = backend_should_export(out, True, {}, "model.onnx", "*.onnx", "ONNX")
    assert not exports and options == {"subfolder": "onnx", "file_name": "model.onnx"}

    # The other modules behind the session's hidden states give the encoder's embeddings.
    texts = ["w5 w6 w7", "w9 w8"]
    features = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    session = onnxruntime.InferenceSession(out / MODEL_FILE)
    (hidden,) = session.run(
        ["last_hidden_state"], {x.name: features[x.name].numpy() for x in session.get_inputs()}
    )
    features = {**features, "token_embeddings": torch.from_numpy(hidden)}
    shutil.copyfile(tmp_path / "encoder" / "model.safetensors", out / "model.safetensors")
    for module in list(sentence_transformers.SentenceTransformer(str(out), device="cpu"))[1:]:
        features = module(features)
    found = features["sentence_embedding"].numpy()
    np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-5)


def say(capsys, *words) -> str:
    """The line of an export that fails."""
    capsys.readouterr()  # bars of what was saved before
    assert cli.main(["export", *map(str, words), "--onnx"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert "nowhere is not a folder" in say(capsys, tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    assert "expected a folder with config.json" in say(capsys, tmp_path / "empty", out)
    BertModel(
        BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path / "bert")
    assert "a model of type 'bert': expected 'lion'" in say(capsys, tmp_path / "bert", out)
    model("MultipleChoice", text_config()).save_pretrained(tmp_path / "choice")
    line = say(capsys, tmp_path / "choice", out)
    assert "architectures='LionForMultipleChoice': expected one of ('LionModel', " in line
    save(QUICK, tmp_path / "model")
    assert "exists and is not an empty folder" in say(
        capsys, tmp_path / "model", tmp_path / "choice"
    )
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert "--onnx needs onnxscript" in (line := say(capsys, tmp_path / "model", out))
    assert "pip install 'lion_hf[onnx]'" in line
    monkeypatch.undo()
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "has no weights" in say(capsys, tmp_path / "model", out)
    with pytest.raises(SystemExit):
        cli.main(["export", str(tmp_path / "model"), str(out)])
    assert "required: --onnx" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "change, lacks",
    [
        ({"architectures": ["LionForMaskedLM"]}, "lacks decoder.bias, a weight of LionForMaskedLM"),
        ({"mask_type": "selective"}, "lacks lion.layers.0.attention.gate.weight"),
    ],
)
def test_random_weights_are_not_exported(change, lacks, tmp_path):
    model("SequenceClassification", text_config("decay")).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=lacks):
        export.export_onnx(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", [OSError("no disk"), KeyboardInterrupt()], ids=repr)
def test_nothing_is_left_of_an_export_that_fails(fault, tmp_path, monkeypatch):
    save(QUICK, tmp_path / "model")

    def fail(network, file):
        file.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(export, "_export", fail)
    with pytest.raises(type(fault)):
        export_onnx(tmp_path / "model", tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_file_that_differs_from_torch_is_not_kept(wrong, tmp_path, monkeypatch):
    """With a session that stands in for a broken exporter."""
    network = save(QUICK, tmp_path / "model")

    class Session:
        def __init__(self, file, providers):
            pass

        def get_inputs(self):
            return []

        def run(self, names, inputs):
            return [np.full((rows.pop(0), 3), wrong, np.float32)]

    rows = [size[0] for size in export.TEXTS]
    monkeypatch.setattr(export, "_export", lambda network, file: file.write_bytes(b"model"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert network.config.num_labels == 3
    with pytest.raises(ValueError, match=r"differs from torch by .* with finite weights"):
        export_onnx(tmp_path / "model", tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["model"]
