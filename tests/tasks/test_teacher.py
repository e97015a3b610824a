"""Teachers for image classification: the loss they give, and how their weights are read."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.images import CLASSES, PLAIN, image_folder, run
from support.softmax_models import softmax_model
from transformers import AutoModelForImageClassification

from lion_hf.auto import image_processor
from lion_hf.linearize.losses import distillation_loss
from lion_hf.tasks import image_classification as script
from lion_hf.tasks.teacher import Teacher, load_teacher, read_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image folder with noise of three colours: train/ and validation/."""
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("token", [False, True], ids=["class output", "distillation token"])
def test_loss_with_a_teacher(folder, tmp_path, kind, token, monkeypatch):
    """The first step's loss, by hand."""
    weights = torch.randn(3 * 16 * 16, 3) / 10
    seen = {}

    def teacher(name, path, num_labels, processor):
        def answer(pixels):
            seen["pixels"], seen["answer"] = pixels.clone(), pixels.flatten(1) @ weights
            return seen["answer"]

        model = torch.nn.Module()
        model.forward = answer
        return Teacher(
            model,
            processor.image_mean,
            processor.image_std,
            None,
            processor.image_mean,
            processor.image_std,
        )

    monkeypatch.setattr(script, "load_teacher", teacher)
    options = [
        "--distillation-type",
        kind,
        "--distillation-alpha",
        "0.3",
        "--distillation-tau",
        "2",
        "--drop_path",
        "0",
    ]
    options += ["--distillation-token"] if token else []
    built, loss = {}, script.ImageTrainer._loss

    def spy(self, outputs, labels, num_items_in_batch=None):
        value = loss(self, outputs, labels, num_items_in_batch)
        if outputs["logits"].requires_grad:
            built.update(outputs=outputs, labels=labels, value=value.item())
        return value

    monkeypatch.setattr(script.ImageTrainer, "_loss", spy)
    metrics = run(folder, tmp_path, *options, "--max_steps", "1")
    logits, distilled = built["outputs"]["logits"], built["outputs"].get("distillation_logits")
    assert (distilled is not None) == token and seen["pixels"].shape == (8, 3, 16, 16)
    own = -(built["labels"] * logits.log_softmax(-1)).sum(-1)
    lesson = distillation_loss(distilled if token else logits, seen["answer"], kind, 2.0)
    torch.testing.assert_close(torch.tensor(built["value"]), (0.7 * own + 0.3 * lesson).mean())
    assert metrics["train_loss"] == pytest.approx(built["value"], abs=1e-4)


def test_a_teacher_computes_in_the_student_s_precision(folder, tmp_path, monkeypatch):
    seen = []

    class Answers(torch.nn.Linear):
        def forward(self, pixels):
            seen.append(super().forward(pixels.flatten(1)))
            return seen[-1]

    model, ones = Answers(3 * 16 * 16, 3), [1.0] * 3
    monkeypatch.setattr(
        script, "load_teacher", lambda *_: Teacher(model, ones, ones, None, ones, ones)
    )
    run(folder, tmp_path, "--distillation-type", "hard", "--max_steps", "1", "--bf16")
    assert seen[0].dtype == torch.bfloat16


@pytest.mark.slow
def test_teacher_of_timm_trained_by_the_script(folder, tmp_path):
    """A convolutional teacher, from its folder and from a file of weights, and its student."""
    metrics = run(
        folder,
        tmp_path / "teacher",
        *PLAIN,
        "--max_steps",
        "100",
        "--input_size",
        "32",
        model=["--model", "lcnet_035"],
    )
    assert metrics["eval_accuracy"] > 0.9
    processor = image_processor(16)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "teacher")
    torch.save({"state_dict": model.timm_model.state_dict()}, tmp_path / "teacher.pth")
    images, teachers = torch.randn(2, 3, 16, 16), {}
    for name, path in (
        (str(tmp_path / "teacher"), None),
        ("lcnet_035", str(tmp_path / "teacher.pth")),
    ):
        teachers[name] = load_teacher(name, path, CLASSES, processor)(images)
    options = [
        "--distillation-type",
        "hard",
        "--teacher-model",
        str(tmp_path / "teacher"),
        "--distillation-token",
    ]
    assert (
        run(folder, tmp_path / "student", *PLAIN, *options, "--max_steps", "25")["eval_accuracy"]
        > 0.9
    )
    assert run(folder, tmp_path / "other", *options, "--max_steps", "1")["eval_loss"] > 0
    with pytest.raises(ValueError, match="does not fit"):
        load_teacher("lcnet_035", str(tmp_path / "teacher.pth"), [*CLASSES, "grey"], processor)


class Bomb:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("lcnet_035", num_classes=3).state_dict()


def test_code_in_a_teacher_s_file_is_not_run(tmp_path, weights):
    for content in (Bomb(tmp_path / "made"), {"state_dict": weights, "x": Bomb(tmp_path / "made")}):
        torch.save(content, tmp_path / "teacher.pth")
        with pytest.raises(
            ValueError, match="teacher_path=.*teacher.pth' cannot be read as weights"
        ):
            load_teacher("lcnet_035", str(tmp_path / "teacher.pth"), CLASSES, image_processor(32))
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "teacher.pth", weights_only=False)
    assert (tmp_path / "made").exists()  # the premise: it would have run


def test_timm_never_opens_the_file(tmp_path, weights, monkeypatch):
    """Its older versions execute what they load."""
    torch.save(weights, tmp_path / "teacher.pth")
    seen, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: seen.append(k) or create(*a, **k))
    load_teacher("lcnet_035", str(tmp_path / "teacher.pth"), CLASSES, image_processor(32))
    assert seen == [{"pretrained": False, "num_classes": 3}]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "optimizer": {}},
        lambda weights: {"model": {"x": torch.zeros(1)}, "model_ema": weights},
        lambda weights: {f"module._orig_mod.{name}": value for name, value in weights.items()},
    ],
    ids=["plain", "state_dict", "model", "model_ema", "prefixes"],
)
def test_files_of_training_scripts(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "teacher.pth")
    found = read_weights(tmp_path / "teacher.pth")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "teacher.safetensors")
    found = read_weights(tmp_path / "teacher.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_numbers_that_are_not_finite(tmp_path, weights, suffix):
    name = sorted(weights)[0]
    weights = {**weights, name: torch.full_like(weights[name], torch.nan)}
    file = tmp_path / f"teacher{suffix}"
    (torch.save if suffix == ".pth" else save_file)(weights, file)
    with pytest.raises(ValueError, match=f"holds NaN or infinity in {name}"):
        read_weights(file)


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\3\4 broken"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(tmp_path, content, suffix):
    file = tmp_path / f"teacher{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(file)


def test_files_without_weights(tmp_path):
    torch.save({"a": 1}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "teacher.pth")


@pytest.mark.parametrize("size", [{"intermediate_size": 10**6}, {"num_hidden_layers": 10**9}])
def test_a_folder_that_claims_a_huge_teacher_is_refused(tmp_path, size):
    softmax_model("ViTForImageClassification").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | size))
    with pytest.raises(ValueError, match="cannot be loaded as a transformers.*(has room|at most)"):
        load_teacher(str(tmp_path), None, ["cat", "dog"], image_processor(16, 1.0))


def test_broken_weights_of_a_teacher_are_named(tmp_path):
    softmax_model("ViTForImageClassification").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2**50).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="cannot be loaded as a transformers image classifier"):
        load_teacher(str(tmp_path), None, ["cat", "dog"], image_processor(16, 1.0))


@pytest.fixture
def classifier(tmp_path) -> Path:
    """The folder of a softmax ViT that knows two classes by their names, and its processor."""
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    network = softmax_model("ViTForImageClassification", num_labels=2, image_size=16, **names)
    network.save_pretrained(tmp_path / "teacher")
    image_processor(16, 1.0).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_teacher_answers_in_the_order_of_the_student_s_classes(classifier, caplog):
    images, processor = torch.randn(2, 3, 16, 16), image_processor(16, 1.0)
    same, other, strange = (
        load_teacher(str(classifier), None, names, processor)(images)
        for names in (["cat", "dog"], ["dog", "cat"], ["n01", "n02"])
    )
    assert torch.equal(same, strange) and torch.equal(same.flip(1), other)
    assert caplog.text.count("have other names (the first 'cat') than the data's ('n01')") == 1


def test_a_teacher_without_a_classifier_is_refused(classifier):
    softmax_model("ViTForImageClassification", num_labels=2).vit.save_pretrained(classifier)
    with pytest.raises(ValueError, match="is not a trained classifier: it lacks classifier.bias"):
        load_teacher(str(classifier), None, ["cat", "dog"], image_processor(16, 1.0))


def test_a_transformers_teacher_takes_no_file_of_weights(classifier):
    with pytest.raises(ValueError, match="teacher_path='a.pth' with teacher_model=.*expected none"):
        load_teacher(str(classifier), "a.pth", ["cat", "dog"], image_processor(16, 1.0))
