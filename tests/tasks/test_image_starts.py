"""`lion-hf images` from a model whose weights, size or options do not fit, and its predictions."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from support.images import CLASSES, MODEL, PLAIN, SIZES, image_folder, noise, run
from support.models import image_config, model
from transformers import TimmWrapperConfig

from lion_hf.tasks.image_model import build_model
from lion_hf.tasks.image_settings import ModelSettings
from lion_hf.training.model_record import check_model

EVALUATE = ("--do_train=false", "--do_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image folder with noise of three colours: train/ and validation/."""
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def source(tmp_path) -> Path:
    """The folder of a classifier of the three colours."""
    names = dict(enumerate(CLASSES))
    network = model("ImageClassification", image_config("decay", id2label=names))
    network.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    "argv, lacks",
    [
        (["--mask_type=Selective"], "gate.weight"),
        (["--model_overrides=num_hidden_layers=3"], "layers.2."),
        ([], "classifier.bias, classifier.weight"),
    ],
    ids=["family", "layers", "classifier"],
)
def test_a_model_with_random_weights_is_not_evaluated(folder, source, tmp_path, argv, lacks):
    if not argv:
        names = dict(enumerate(CLASSES))
        network = model("MaskedImageModeling", image_config("decay", id2label=names))
        network.save_pretrained(source)
    with pytest.raises(SystemExit, match=f"is not trained for this: it lacks .*{lacks}"):
        run(folder, tmp_path / "out", *EVALUATE, *argv, model=["--model", str(source)])
    assert not (tmp_path / "out/eval_metrics.json").exists()


@pytest.mark.parametrize(
    "argv",
    [MODEL, [*MODEL, "--softmax"], ["--model=test_vit"], ["--from_scratch"]],
    ids=["preset", "softmax", "timm", "from scratch"],
)
def test_random_weights_are_not_evaluated(folder, source, tmp_path, argv):
    if argv == ["--from_scratch"]:
        argv = ["--model", str(source), *argv]
    with pytest.raises(SystemExit, match="do_train=False, but .* is not trained for this"):
        run(folder, tmp_path / "out", *EVALUATE, model=argv)


@pytest.mark.slow
def test_a_finished_run_is_evaluated_with_the_model_that_it_began_with(folder, source, tmp_path):
    backbone = ["--model", str(source)]
    model("MaskedImageModeling", image_config("decay")).save_pretrained(source)
    trained = run(folder, tmp_path / "out", *PLAIN, "--max_steps=2", model=backbone)
    found = run(folder, tmp_path / "out", *EVALUATE, model=backbone)
    assert found["eval_loss"] == pytest.approx(trained["eval_loss"])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """The output of a training of LION-D, with a checkpoint."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run(folder, output, *PLAIN, "--max_steps=1", "--save_strategy=steps", "--save_steps=1")
    return output


@pytest.mark.parametrize("named", [False, True], ids=["output_dir", "resume"])
@pytest.mark.parametrize(
    "argv, message",
    [
        (["--softmax"], "model_type was 'lion' and is 'vit'"),
        (["--mask_type=Selective"], "mask_type was 'decay' and is 'selective'"),
        (["--input_size=20"], "image_size was 16 and is 20"),
    ],
)
def test_weights_of_a_run_are_those_of_its_model(folder, finished, tmp_path, argv, message, named):
    output = tmp_path / "out" if named else finished
    resume = [f"--resume={finished}/checkpoint-1"] if named else []
    with pytest.raises(SystemExit, match=f"holds another model: {message}"):
        run(folder, output, *EVALUATE, *argv, *resume)


@pytest.mark.parametrize("renamed", [True, False], ids=["other names", "fewer"])
def test_weights_of_a_run_are_for_its_classes(folder, finished, tmp_path, renamed):
    """ "amber" comes before the others, whose numbers would then be one too high."""
    shutil.copytree(folder, tmp_path / "data")
    for part in ("train", "validation"):
        place = tmp_path / "data" / part / "red"
        if renamed:
            place.rename(place.with_name("amber"))
        else:
            shutil.rmtree(place)
    with pytest.raises(SystemExit, match=r"was trained for the classes \['blue', 'green', 'red'\]"):
        run(tmp_path / "data", finished, *EVALUATE)
    if not renamed:  # as the message says
        own = ["--model", str(finished)]
        assert "eval_accuracy" in run(tmp_path / "data", tmp_path / "out", *EVALUATE, model=own)


@pytest.mark.slow
def test_a_run_without_positions_is_evaluated_at_any_size(folder, tmp_path):
    network = [*MODEL, "--model_overrides", f"{SIZES},use_position_embeddings=false"]
    trained = run(folder, tmp_path / "out", *PLAIN, "--max_steps=1", model=network)
    same = run(folder, tmp_path / "out", *EVALUATE, model=network)
    larger = run(folder, tmp_path / "out", *EVALUATE, model=[*network, "--input_size=20"])
    assert same["eval_loss"] == pytest.approx(trained["eval_loss"])
    assert larger["eval_loss"] != pytest.approx(trained["eval_loss"])


@pytest.mark.slow
def test_classes_of_a_run_of_another_model(folder, tmp_path):
    """It cannot be named as the model, which would be the cure for LION's."""
    network = [*MODEL, "--softmax"]
    run(folder, tmp_path / "out", *PLAIN, "--max_steps=1", model=network)
    shutil.copytree(folder, tmp_path / "data")
    for part in ("train", "validation"):
        shutil.rmtree(tmp_path / "data" / part / "red")
    with pytest.raises(SystemExit, match="in this order: evaluate it on data with its classes"):
        run(tmp_path / "data", tmp_path / "out", *EVALUATE, model=network)


def test_damaged_weights_of_a_run_are_named(folder, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "out")
    file = output / "model.safetensors"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(SystemExit, match="out: its weights cannot be loaded: .*header"):
        run(folder, output, *EVALUATE)


@pytest.mark.parametrize("other", [False, True], ids=["same classes", "other classes"])
def test_weights_of_another_width_are_refused(folder, source, tmp_path, other):
    if other:
        names = {n: f"dark {name}" for n, name in enumerate(CLASSES)}
        config = json.loads((source / "config.json").read_text())
        config |= {"id2label": names, "label2id": {name: n for n, name in names.items()}}
        (source / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(source), "--model_overrides=hidden_size=48"]
    with pytest.raises(SystemExit, match=" has shape .*, the settings ask for .*48"):
        run(folder, tmp_path / "out", *PLAIN, "--max_steps=1", model=argv)


def test_damaged_weights_are_named_in_one_line(folder, source, tmp_path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(SystemExit, match="its weights cannot be loaded: .*header"):
        run(folder, tmp_path / "out", "--max_steps=1", model=["--model", str(source)])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--mask_type=Decay"], "mask_type='Decay' with model='test_vit': expected none"),
        (["--pos_emb"], "pos_emb=True with model='test_vit'"),
        (["--softmax"], "softmax=True with model='test_vit'"),
        (["--input_size=31", "--model_overrides=dynamic_img_size=false,depth=x"], "does not take"),
    ],
)
def test_options_that_a_model_of_timm_does_not_have(folder, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message):
        run(folder, tmp_path / "out", "--max_steps=1", *argv, model=["--model", "test_vit"])


def test_stochastic_depth_of_a_model_of_timm():
    """The recipes set it, so that it must not be an option of LION's alone."""
    network = build_model(ModelSettings(model="test_vit", drop_path=0.1), CLASSES)
    assert network.timm_model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_a_run_of_timm_is_evaluated_without_its_dropout(tmp_path):
    """As one of LION is."""
    trained, deeper = (
        TimmWrapperConfig(architecture="test_vit", model_args={"drop_path_rate": 0.1} | more)
        for more in ({}, {"depth": 3})
    )
    trained.save_pretrained(tmp_path)
    check_model(tmp_path, TimmWrapperConfig(architecture="test_vit", model_args={}), evaluated=True)
    with pytest.raises(ValueError, match="model_args was {} and is {'depth': 3}"):
        check_model(tmp_path, deeper, evaluated=True)


@pytest.mark.slow
@pytest.mark.parametrize("argv, size", [([], 160), (["--input_size=32"], 32)])
def test_models_of_timm_for_one_size_get_images_of_it(folder, tmp_path, argv, size):
    network = ["--model", "test_vit", "--model_overrides", "dynamic_img_size=false"]
    run(folder, tmp_path / "out", *PLAIN, "--max_steps=1", *argv, model=network)
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": size, "width": size}


def test_unreadable_images_to_predict_are_found_before_the_training(folder, tmp_path):
    (tmp_path / "new").mkdir()
    noise(0).save(tmp_path / "new/good.png")
    (tmp_path / "new/bad.png").write_bytes(b"no image")
    argv = ["--do_predict", f"--predict_path={tmp_path}/new", "--max_steps=1"]
    with pytest.raises(SystemExit, match="1 of 2 predicted images cannot be read"):
        run(folder, tmp_path / "out", *PLAIN, *argv)
    assert not (tmp_path / "out/settings.yaml").exists()


@pytest.mark.slow
def test_a_folder_to_predict_without_predictions_is_told(folder, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    argv = ["--predict_path", str(tmp_path), "--max_steps=1"]
    run(folder, tmp_path / "out", *PLAIN, *argv)
    assert "is not used: add --do_predict" in caplog.text


@pytest.mark.slow
def test_broken_links_are_left_out(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data/train/red/zz.png").symlink_to(tmp_path / "gone.png")
    argv = ["--max_unreadable=0.1", "--max_steps=6"]
    metrics = run(tmp_path / "data", tmp_path / "out", *PLAIN, *argv)
    assert "zz.png cannot be read" in caplog.text and metrics["eval_accuracy"] > 0.3
