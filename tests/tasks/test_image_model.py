"""Which image model `lion-hf images` trains, and in which order its classes are."""

from pathlib import Path

import pytest
import torch
from support.images import CLASSES, PLAIN, SIZES, image_folder, run
from support.models import image_config, model
from transformers import AutoModelForImageClassification

from lion_hf import LionConfig, LionForImageClassification
from lion_hf.tasks import image_classification as script
from lion_hf.tasks.image_model import ModelSettings, build_model, class_order, softmax_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image folder with noise of three colours: train/ and validation/."""
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    "words, fields",
    [
        (
            ["--mask_type", "Selective", "--order", "S", "--format", "Attention"],
            {
                "mask_type": "selective",
                "patch_order": "snake",
                "attention_form": "attention",
                "classifier_pooling": "mean",
            },
        ),
        (
            [
                "--mask_type",
                "Lit",
                "--order",
                "Normal",
                "--format",
                "RNN",
                "--pos_emb",
                "--cls_tok",
            ],
            {
                "mask_type": "lit",
                "attention_form": "recurrent",
                "use_position_embeddings": True,
                "classifier_pooling": "cls",
            },
        ),
        (
            ["--mask_type", "Decay", "--format", "Chunk", "--chunk_size", "3"],
            {
                "mask_type": "decay",
                "attention_form": "chunk",
                "chunk_size": 3,
                "use_position_embeddings": False,
            },
        ),
    ],
    ids=["selective", "lit", "decay"],
)
def test_original_command_lines(folder, tmp_path, words, fields):
    """In a small size, which the original's words do not reach, without the usual options."""
    command = [
        "--model",
        "lion_tiny_patch16_224",
        "--batch-size",
        "4",
        "--data-path",
        str(folder),
        "--output_dir",
        str(tmp_path),
    ]
    extra = [
        "--model_overrides",
        SIZES,
        "--input-size",
        "16",
        "--max_steps",
        "2",
        "--use_cpu",
        "--disable_tqdm",
        "true",
    ]
    metrics = script.main([*command, "--output_dir", str(tmp_path), *words, *extra])
    config = LionConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.feature_map == (
        "elu_plus_one" if fields["mask_type"] == "lit" else "normalized_silu"
    )
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_original_sizes():
    settings = script.ModelSettings(model="lion_small_patch16_224", mask_type="Decay")
    with torch.device("meta"):
        config = script.build_model(settings, list(CLASSES), False).config
    assert (
        config.hidden_size,
        config.num_attention_heads,
        config.image_size,
        config.patch_size,
    ) == (384, 6, 224, 16)
    assert config.id2label == dict(enumerate(CLASSES)) and not config.use_position_embeddings


def test_softmax_baseline(folder, tmp_path):
    metrics = run(folder, tmp_path, *PLAIN, "--softmax", "--max_steps", "2")
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert (model.config.model_type, model.config.hidden_size, model.config.image_size) == (
        "vit",
        24,
        16,
    )
    assert metrics["eval_loss"] > 0
    lion = LionForImageClassification(
        LionConfig.from_pretrained(ROOT / "configs/lion-lit-tiny-patch16-224")
    )
    with torch.device("meta"):
        vit = softmax_model(lion.config, {"num_labels": 1000})
    assert vit.num_parameters() == lion.num_parameters()


def test_what_a_softmax_vit_learns_without_is_named(caplog):
    settings = {"model": "lion-d-snake-tiny-patch16-224", "softmax": True}
    build_model(
        ModelSettings(**settings, mask_type="decay", chunk_size=64, cls_tok=True), ["a", "b"]
    )
    (line,) = (x.message for x in caplog.records if "softmax" in x.message)
    assert line.endswith("ViT learns without mask_type=decay, chunk_size=64, drop_path=0.1")
    caplog.clear()
    build_model(ModelSettings(**settings, drop_path=0.0), ["a", "b"])
    assert "softmax" not in caplog.text


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"model": "lion-lit-tiny-patch16-224", "softmax": True}, "softmax=True"),
        ({"model": "test_vit"}, "model='test_vit'"),
    ],
)
def test_a_distillation_token_for_models_that_have_none(options, given):
    with pytest.raises(ValueError, match=f"distillation_token=True with {given}: expected False"):
        build_model(ModelSettings(**options), ["a", "b"], distillation_head=True)


def test_fine_tuning_at_another_resolution(folder, tmp_path):
    run(folder, tmp_path / "one", *PLAIN, "--max_steps", "25")
    first = LionForImageClassification.from_pretrained(tmp_path / "one")
    metrics = run(
        folder, tmp_path / "two", *PLAIN, "--max_steps=1", "--learning_rate=1e-9",
        "--input_size=24", model=["--model_name_or_path", str(tmp_path / "one")],
    )  # fmt: skip
    assert metrics["eval_accuracy"] > 0.9
    second = LionForImageClassification.from_pretrained(tmp_path / "two")
    assert (
        second.config.image_size == 24 and second.lion.embeddings.position_embeddings.shape[1] == 37
    )
    image = torch.randn(1, 3, 24, 24)
    torch.testing.assert_close(second(image).logits, first(image).logits, atol=1e-3, rtol=1e-3)


def saved(folder: Path, names: list[str] | None, **kwargs) -> ModelSettings:
    """A classifier whose classes have these names; None for those that transformers makes up."""
    labels = {}
    if names is not None:
        labels = {
            "id2label": dict(enumerate(names)),
            "label2id": {x: n for n, x in enumerate(names)},
        }
    network = model("ImageClassification", image_config(**labels, **kwargs))
    network.save_pretrained(folder)
    return ModelSettings(model=str(folder))


def test_classes_keep_the_numbers_of_a_model_that_knows_them(tmp_path):
    settings = saved(tmp_path, ["red", "blue", "green"])
    names = class_order(settings, list(CLASSES), train=True)
    assert names == ["red", "blue", "green"]
    built = build_model(settings, names)
    first = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(built.classifier.weight, first.classifier.weight)
    assert built.config.id2label == first.config.id2label


def test_a_model_of_other_classes_gets_a_new_classifier(tmp_path, caplog):
    settings = saved(
        tmp_path, ["cat", "dog", "lion"], distillation_head=True, classifier_pooling="mean"
    )
    assert class_order(settings, list(CLASSES), train=True) == list(CLASSES)
    built = build_model(settings, list(CLASSES))
    assert "a random one takes its place" in caplog.text and "'cat'" in caplog.text
    first = AutoModelForImageClassification.from_pretrained(tmp_path)
    for head in ("classifier", "distiller"):
        one, two = getattr(built, head), getattr(first, head)
        assert not torch.equal(one.weight, two.weight) and not one.bias.any()
    body = [dict(x.lion.named_parameters()) for x in (built, first)]
    assert all(torch.equal(body[0][name], body[1][name]) for name in body[0])
    with pytest.raises(ValueError, match="does not know 3 classes of the data, such as 'blue'"):
        class_order(settings, list(CLASSES), train=False)


def test_a_model_without_names_takes_those_of_the_data(tmp_path, caplog):
    settings = saved(tmp_path, None)
    assert class_order(settings, list(CLASSES), train=False) == list(CLASSES)
    built = build_model(settings, list(CLASSES))
    first = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(built.classifier.weight, first.classifier.weight)
    assert built.config.id2label == dict(enumerate(CLASSES)) and "random" not in caplog.text


def test_evaluation_of_some_of_a_model_s_classes(tmp_path):
    names = ["red", "yellow", "blue", "green"]
    settings = saved(tmp_path, names, num_labels=4)
    assert class_order(settings, list(CLASSES), train=False) == names
    assert class_order(settings, list(CLASSES), train=True) == list(CLASSES)


def test_the_model_s_order_of_classes_is_evaluated(folder, tmp_path):
    """The figures of a model do not depend on how its classes are numbered."""
    run(folder, tmp_path / "one", *PLAIN, "--max_steps=25")
    trained = LionForImageClassification.from_pretrained(tmp_path / "one")
    order = torch.tensor([2, 0, 1])
    for name in ("weight", "bias"):
        parameter = getattr(trained.classifier, name)
        parameter.data = parameter.data[order]
    trained.config.id2label = {n: CLASSES[old] for n, old in enumerate(order.tolist())}
    trained.config.label2id = {name: n for n, name in trained.config.id2label.items()}
    trained.save_pretrained(tmp_path / "two")
    figures = [
        run(folder, tmp_path / f"eval-{x}", "--do_train=false", "--do_eval",
            model=["--model", str(tmp_path / x)])
        for x in ("one", "two")
    ]  # fmt: skip
    assert figures[0]["eval_accuracy"] > 0.9
    assert figures[1]["eval_loss"] == pytest.approx(figures[0]["eval_loss"], abs=1e-5)
