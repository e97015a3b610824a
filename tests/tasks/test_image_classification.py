"""`lion-hf images` on tiny pictures: runs, continued runs, evaluation, predictions, errors."""

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.images import (
    CLASSES,
    PLAIN,
    SHORT,
    SIZES,
    image_folder,
    losses,
    parquet,
    run,
)
from support.launches import LAUNCHES, start
from transformers import pipeline

from lion_hf.data.augmentation import Augmentation
from lion_hf.data.images import open_image
from lion_hf.data.samples import SeededDataset, SkippedSample
from lion_hf.tasks import image_classification as script
from lion_hf.tasks.image_trainer import AVERAGE_FILE, CheckUnreadable
from lion_hf.tasks.teacher import Teacher

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image folder with noise of three colours: train/ and validation/."""
    return image_folder(tmp_path_factory.mktemp("images"))


def test_deit_recipe(folder, tmp_path):
    metrics = run(
        folder, tmp_path, *PLAIN, "--max_steps", "25", "--model-ema", "--model_ema_decay", "0.8"
    )
    assert metrics["eval_accuracy"] > 0.9 and metrics["eval_ema_accuracy"] > 0.6
    assert "eval_accuracy_top5" not in metrics  # three classes
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    for name in (
        "curves.csv",
        "settings.yaml",
        "README.md",
        "modeling_lion.py",
        "ema/README.md",
        "ema/modeling_lion.py",
    ):
        assert (tmp_path / name).stat().st_size > 100
    right = {}
    for kind in (
        tmp_path,
        tmp_path / "ema",
    ):  # the saved models and their processor are what was evaluated
        classify, answers = pipeline("image-classification", model=str(kind)), []
        for name in CLASSES:
            files = sorted(map(str, (folder / "validation" / name).glob("*.png")))
            answers += [answer[0]["label"] == name for answer in classify(files, top_k=1)]
        right[kind.name] = np.mean(answers)
    assert list(right.values()) == pytest.approx(
        [metrics["eval_accuracy"], metrics["eval_ema_accuracy"]]
    )


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(folder, tmp_path):
    command = [
        "--model",
        "lion_tiny_patch16_224",
        "--data-path",
        str(folder),
        "--mask_type",
        "Selective",
        "--order",
        "S",
    ]
    command += [
        "--format",
        "Chunk",
        "--model_overrides",
        f"{SIZES},num_hidden_layers=1",
        "--input-size",
        "16",
    ]
    command += [
        "--drop-path",
        "0",
        "--max_steps",
        "7",
        "--logging_steps",
        "1",
        "--disable_tqdm",
        "true",
    ]
    command += ["--lr", "0.1", "--model_ema_decay", "0.5", "--report_to", "none"]
    script.main(
        [*command, "--batch-size", "12", "--output_dir", str(tmp_path / "one"), "--use_cpu"]
    )
    start(
        LAUNCHES["torchrun"][0],
        str(ROOT / "run_scripts/run_image_classification.py"),
        *command,
        "--batch-size",
        "6",
        "--output_dir",
        str(tmp_path / "two"),
    )
    one, two = (json.loads((tmp_path / x / "metrics.json").read_text()) for x in ("one", "two"))
    for name in ("train_loss", "eval_loss", "eval_accuracy", "eval_ema_loss"):
        assert two[name] == pytest.approx(one[name], abs=1e-5), name
    one, two = ([float(loss) for loss in losses(tmp_path / x)] for x in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5) and len(set(one)) == 7


def test_top5():
    best = torch.tensor(
        [[3, 1, 2, 0, 4], [5, 1, 2, 0, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    ).numpy()
    probabilities, losses = np.array([0.5, 0.5, 0.5, np.nan]), np.array([1.0, 2, 3, 0])
    prediction = SimpleNamespace(
        predictions=(best, probabilities, losses), label_ids=np.array([3, 4, 5, -100])
    )
    expected = {"accuracy": 1 / 3, "accuracy_top5": 2 / 3, "exact_loss": 2.0, "left_out": 1}
    assert script.accuracies(prediction, 6) == pytest.approx(expected)
    with pytest.raises(ValueError, match="1 of 4 evaluated images .* max_unreadable=0.2"):
        script.accuracies(prediction, 6, max_unreadable=0.2)


def test_defaults_are_the_deit_recipe(tmp_path):
    args = script.ImageTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=256
    )
    assert (args.num_train_epochs, args.weight_decay, args.learning_rate) == (300, 0.05, 2.5e-4)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5} and args.warmup_steps == 5 / 300
    args = script.ImageTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, num_train_epochs=20, warmup_epochs=1
    )
    assert args.warmup_steps == 0.05
    for name, value in (("lr", math.nan), ("min_lr", -1.0)):
        with pytest.raises(ValueError, match=f"^{name}={value}: expected a number of at least 0"):
            script.ImageTrainingArguments(output_dir=str(tmp_path), **{name: value})
    with pytest.raises(ValueError, match="warmup_epochs=20"):
        script.ImageTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, num_train_epochs=20, warmup_epochs=20
        )


@pytest.mark.parametrize("config", ["imagenet", "imagenet-distilled", "fashion-mnist"])
def test_settings_files(folder, tmp_path, config, monkeypatch):
    monkeypatch.setattr(
        script,
        "load_teacher",
        lambda name, *_: Teacher(torch.nn.Identity(), [1] * 3, [1] * 3, None, [1] * 3, [1] * 3),
    )
    argv = [
        "--config",
        str(ROOT / "configs/images" / f"{config}.yaml"),
        "--data_path",
        str(folder),
        *SHORT,
    ]
    argv += [
        "--output_dir",
        str(tmp_path),
        "--bf16",
        "false",
        "--dataloader_num_workers",
        "0",
        "--total_batch_size",
        "8",
    ]
    settings = script.parse_settings(
        "",
        script.ModelSettings,
        script.DataSettings,
        Augmentation,
        script.TeachingSettings,
        script.ImageTrainingArguments,
        argv=[*argv, "--model_overrides", SIZES, "--input_size", "28"],
    )  # fmt: skip
    trainer = script.build_trainer(*settings)
    assert trainer.model.config.patch_order == "snake" and (trainer.teacher is not None) == (
        config == "imagenet-distilled"
    )
    assert trainer.model.config.distillation_head == (config == "imagenet-distilled")


@pytest.mark.parametrize(
    "options",
    [["--model-ema"], ["--repeated_aug", "1", "--dataloader_num_workers", "1"]],
    ids=["ema", "workers"],
)
def test_continued_run_gives_the_same_losses(folder, tmp_path, options):
    options = [
        *options,
        "--model_ema_decay",
        "0.8",
        "--num_train_epochs",
        "3",
        "--drop_path",
        "0.2",
    ]
    options += ["--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "9"]
    whole = run(folder, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for checkpoint in (tmp_path / "cut").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 6:  # in the middle of the second epoch of 5 steps
            shutil.rmtree(checkpoint)
    continued = run(folder, tmp_path / "cut", *options)
    assert len(losses(tmp_path / "whole")) == 15 and losses(tmp_path / "cut") == losses(
        tmp_path / "whole"
    )
    for name in ("eval_loss", "eval_ema_loss"):
        assert continued.get(name) == whole.get(name)
    if "--model-ema" in options:
        one, two = (
            load_file(tmp_path / x / "checkpoint-15" / AVERAGE_FILE) for x in ("whole", "cut")
        )
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_best_average_is_loaded_at_the_end(folder, tmp_path):
    options = "--load_best_model_at_end true --metric_for_best_model ema_loss"
    options += " --greater_is_better false --eval_strategy steps"
    options += (
        " --eval_steps 1 --save_strategy steps --save_steps 1 --max_steps 4 --learning_rate 3"
    )
    metrics = run(folder, tmp_path, *options.split(), "--model-ema", "--model_ema_decay", "0.1")
    with open(tmp_path / "curves.csv", encoding="utf-8", newline="") as file:
        losses = [
            float(row["eval_ema_loss"]) for row in csv.DictReader(file) if row["eval_ema_loss"]
        ][:3]
    assert metrics["eval_ema_loss"] == pytest.approx(min(losses)) and max(losses) > min(losses)


@pytest.mark.parametrize("kind", ["folder", "files"])
@pytest.mark.parametrize("label", [lambda n: n, lambda n: CLASSES[n]], ids=["numbers", "names"])
def test_parquet_gives_the_losses_of_the_folder(folder, tmp_path, kind, label):
    run(folder, tmp_path / "images", "--max_steps", "2")
    (tmp_path / "tables").mkdir()
    for part in ("train", "validation"):
        shutil.copy(parquet(folder, part, label), tmp_path / "tables")
    files = ["train", "validation"]
    data = [
        x
        for part in files
        for x in (f"--{part}_file", str(tmp_path / "tables" / f"{part}.parquet"))
    ]
    run(
        folder,
        tmp_path / "table",
        "--max_steps",
        "2",
        data=data if kind == "files" else ["--data_path", str(tmp_path / "tables")],
    )
    assert losses(tmp_path / "table") == losses(tmp_path / "images")


def test_corrupt_images_are_replaced_in_training(folder, tmp_path, caplog):
    shutil.copytree(folder / "train", tmp_path / "data/train")
    shutil.copytree(folder / "validation", tmp_path / "data/test")
    (tmp_path / "data/train/red/0.png").write_bytes((folder / "train/red/0.png").read_bytes()[:100])
    (tmp_path / "data/train/red/1.png").write_bytes(b"no image")
    metrics = run(
        tmp_path / "data",
        tmp_path / "out",
        "--num_train_epochs",
        "1",
        "--repeated_aug",
        "1",
        "--max_unreadable=0.1",
    )
    assert metrics["eval_loss"] > 0
    for name in ("red/0.png", "red/1.png"):
        assert any("skipped" in message and name in message for message in caplog.messages)
    with pytest.raises(SkippedSample, match="an image of the table"):
        open_image(b"")


def test_evaluation_and_prediction_without_training(folder, tmp_path):
    trained = run(folder, tmp_path / "model", *PLAIN, "--max_steps=25")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "model").iterdir()}
    unlabelled = tmp_path / "new"
    (unlabelled / "red").mkdir(parents=True)
    shutil.copy(folder / "validation/red/0.png", unlabelled / "red/known.png")
    shutil.copy(folder / "validation/blue/0.png", unlabelled / "unknown.png")
    (unlabelled / "broken.png").write_bytes(b"no image")
    model = ["--model", str(tmp_path / "model")]
    only = ["--do_train=false", "--do_predict"]
    metrics = run(folder, tmp_path / "one", *only, "--do_eval", model=model)
    assert metrics["eval_accuracy"] == trained["eval_accuracy"] > 0.9
    assert metrics["eval_loss"] == pytest.approx(trained["eval_loss"])
    assert json.loads((tmp_path / "one/eval_metrics.json").read_text())["eval_loss"]
    rows = predictions(tmp_path / "one")
    assert len(rows) == 15 and rows[0]["file"] == str(folder / "validation/blue/0.png")
    right = np.mean([row["predicted"] == row["label"] for row in rows])
    assert right == pytest.approx(trained["eval_accuracy"])
    assert all(1 / 3 < float(row["probability"]) <= 1 for row in rows)
    shutil.copytree(folder / "validation", tmp_path / "alone/val")
    for data in (["--data_path", str(tmp_path / "alone")], validation_file(folder)):
        again = run(folder, tmp_path / "more", *only, "--do_eval", model=model, data=data)
        assert again["eval_loss"] == metrics["eval_loss"]
    run(
        folder, tmp_path / "two", *only, f"--predict_path={unlabelled}", "--max_unreadable=0.5",
        model=model,
    )  # fmt: skip
    broken, known, unknown = predictions(tmp_path / "two")
    assert (broken["label"], broken["predicted"], broken["probability"]) == ("", "", "")
    assert (known["label"], known["predicted"]) == ("red", "red")
    assert (unknown["label"], unknown["predicted"]) == ("", "blue")
    assert not (tmp_path / "two/config.json").exists()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "model").iterdir()} == before
    with pytest.raises(SystemExit, match="there is nothing to do"):
        run(folder, tmp_path / "three", "--do_train=false", model=model)


def validation_file(folder: Path) -> list[str]:
    return ["--validation_file", parquet(folder, "validation")]


def predictions(output: Path) -> list[dict[str, str]]:
    with open(output / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_unreadable_validation_images_are_left_out(folder, tmp_path, caplog):
    shutil.copytree(folder / "train", tmp_path / "data/train")
    shutil.copytree(folder / "validation", tmp_path / "data/validation")
    whole = run(tmp_path / "data", tmp_path / "whole", *PLAIN, "--max_steps=12")
    for name in ("blue/2.png", "red/4.png"):
        (tmp_path / "data/validation" / name).write_bytes(b"no image")
    metrics = run(
        tmp_path / "data", tmp_path / "out", *PLAIN, "--max_steps=12", "--max_unreadable=0.2"
    )
    assert metrics["eval_left_out"] == 2 and "eval_left_out" not in whole
    rest = [row for n, row in enumerate(answers_of(tmp_path / "whole", folder)) if n not in (2, 14)]
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(rest))
    for name in ("blue/2.png", "red/4.png"):
        assert sum("left out" in text and name in text for text in caplog.messages) == 1
    with pytest.raises(SystemExit, match="2 of 15 validation images cannot be read.*blue/2.png"):
        run(tmp_path / "data", tmp_path / "other", *PLAIN, "--max_steps=12")
    assert not (tmp_path / "other").exists()


def test_unreadable_images_are_an_error_before_the_model_is_built(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "data")
    for file in (tmp_path / "data/train/red").iterdir():
        file.write_bytes(b"no image")
    monkeypatch.setattr(script, "build_model", lambda *_: pytest.fail("was built"))
    with pytest.raises(SystemExit, match="training images cannot be read, which is more than"):
        run(tmp_path / "data", tmp_path / "out", *PLAIN, "--max_steps=2")
    assert not (tmp_path / "out").exists()


def answers_of(model: Path, folder: Path) -> list[bool]:
    """Whether a pipeline names the class of each validation image."""
    classify = pipeline("image-classification", model=str(model), device="cpu")
    files = [file for name in CLASSES for file in sorted((folder / "validation" / name).iterdir())]
    return [classify(str(file), top_k=1)[0]["label"] == file.parent.name for file in files]


def test_too_many_unreadable_images_stop_a_training(folder, tmp_path):
    """Also those that the first look, at some of them, does not find."""
    dataset = SeededDataset([*range(300)], broken, 0)
    check = CheckUnreadable(dataset, most=0.1)
    args = SimpleNamespace(train_batch_size=8, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="more than max_unreadable=0.1 allows"):
        for step in range(30):
            for n in range(8):
                dataset[8 * step + n]
            check.on_step_end(args, None, None)
    assert 100 < check.drawn < 300


def broken(number: int) -> dict:
    if number % 5 == 0:
        raise SkippedSample(f"{number} is broken")
    return {"n": number}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda root: [
                (root / part / "red").rename(root / part / "amber")
                for part in ("train", "validation")
            ],
            r"classes\[0\] was 'blue' and is 'amber'",
        ),
        (lambda root: (root / "train/red/0.png").unlink(), r"train\['images'\] was 36 and is 35"),
        (
            lambda root: shutil.copy(root / "train/red/1.png", root / "validation/blue/3.png"),
            r"held_out\['files'\]",
        ),
    ],
    ids=["class renamed", "image removed", "image replaced"],
)
def test_a_run_does_not_continue_with_other_data(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns("*.parquet"))
    options = [*PLAIN, "--save_strategy=steps", "--save_steps=1"]
    run(tmp_path / "data", tmp_path / "out", *options, "--max_steps=1")
    (tmp_path / "data").rename(tmp_path / "moved")  # a folder may move as a whole
    run(tmp_path / "moved", tmp_path / "out", *options, "--max_steps=2")
    change(tmp_path / "moved")
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "moved", tmp_path / "out", *options, "--max_steps=3")
    assert not (tmp_path / "out/checkpoint-3").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--input_size", "18"], "expected multiples of patch_size=4"),
        (["--model", "lion_huge_patch16_224"], "did you mean lion_"),
        (["--model", "lion-d-snak-tiny-patch16-224"], "expected lion-d-snake-tiny-patch16-224"),
        (["--mask_type", "Decai"], "mask_type='Decai': expected one of Lit, Decay, Selective"),
        (["--format", "Fast"], "format='Fast'"),
        (["--model", "configs/lion-d-base"], "expected a LION model for images"),
        (["--model_overrides", "hiden_size=3"], "did you mean hidden_size"),
        (["--aa", "rund-m9"], "aa='rund-m9'"),
        (["--dataset_config", "large"], "dataset_config='large' without dataset"),
        (
            ["--distillation-type", "hard", "--teacher-model", "regnety_161"],
            "did you mean regnety_1",
        ),
        (
            [
                "--distillation-type",
                "hard",
                "--teacher-model",
                "resnet10t",
                "--teacher-path",
                "none.pth",
            ],
            "no such file",
        ),
        (
            ["--distillation-type", "hard", "--teacher-model", "resnet10t"],
            "has 1000 classes: expected the data's 3",
        ),
        (["--distillation-type", "hard", "--teacher-model", "no/folder"], "cannot be loaded"),
        (
            ["--distillation-type", "hard", "--distillation-token", "--cls_tok"],
            "distillation_head=True",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_errors_before_any_work(folder, tmp_path, argv, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=message):
        run(folder, tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--mixup", "-1"], "mixup=-1.0"),
        (["--reprob", "1.5"], "reprob=1.5"),
        (["--repeated_aug", "0"], "repeated_aug=0"),
        (["--distillation-type", "warm"], "distillation_type='warm'"),
        (["--distillation-token"], "distillation_token without a teacher"),
        (["--teacher-path", "a.pth"], "teacher_path without a teacher"),
        (["--label_smoothing_factor", "0.1"], "its name here is smoothing"),
        (["--smothing", "0.1"], "did you mean --smoothing"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_errors_of_settings(folder, tmp_path, argv, message, capsys):
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", *argv)
    assert message in capsys.readouterr().err
