"""run_scripts/run_image_classification.py on tiny images: data, teachers, averages, continuing, errors."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.launches import LAUNCHES, start
from support.marks import slow_except
from transformers import AutoModelForImageClassification, pipeline

from lion_hf import LionConfig, LionForImageClassification
from lion_hf.auto import image_processor
from lion_hf.data.augmentation import Augmentation
from lion_hf.data.images import open_image, read_images
from lion_hf.data.samples import SkippedSample
from lion_hf.linearize.distillation import distillation_loss
from lion_hf.tasks import image_classification as script
from lion_hf.tasks.image_model import softmax_model
from lion_hf.tasks.image_trainer import AVERAGE_FILE
from lion_hf.tasks.teacher import Teacher, load_teacher

ROOT = Path(__file__).parents[2]

CLASSES = ("blue", "green", "red")
SIZES = "hidden_size=24,num_hidden_layers=2,num_attention_heads=2,intermediate_size=48,patch_size=4,initializer_range=0.2"
SMALL = [
    "--model",
    "lion-d-snake-tiny-patch16-224",
    "--model_overrides",
    SIZES,
    "--input_size",
    "16",
]
SHORT = [
    "--batch-size",
    "8",
    "--learning_rate",
    "3e-3",
    "--report_to",
    "none",
    "--use_cpu",
    "--disable_tqdm",
    "true",
]
SHORT += [
    "--logging_steps",
    "1",
    "--eval_strategy",
    "no",
    "--save_strategy",
    "no",
    "--no-model-ema",
]
PLAIN = [
    "--aa",
    "none",
    "--color_jitter",
    "0",
    "--src",
    "--reprob",
    "0",
    "--mixup",
    "0",
    "--cutmix",
    "0",
]


def picture(colour: int, generator: np.random.Generator) -> Image.Image:
    pixels = generator.integers(0, 120, (18, 20, 3), dtype=np.uint8)
    pixels[..., 2 - colour] += 100
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image folder with noise of three colours: train/ and validation/."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 12), ("validation", 5)):
        for number, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                picture(number, generator).save(folder / part / name / f"{n}.png")
    return folder


def run(
    folder: Path, output: Path, *argv: str, model: list[str] = SMALL, data: tuple[str, ...] = ()
) -> dict[str, float]:
    data = data or ("--data-path", str(folder))
    return script.main([*model, *data, *SHORT, "--output_dir", str(output), *argv])


def losses(output: Path) -> list[str]:
    """The losses of all steps, as they stand in the table."""
    with open(output / "curves.csv", encoding="utf-8", newline="") as file:
        return [row["loss"] for row in csv.DictReader(file) if row["loss"]]


def parquet(folder: Path, part: str, label=lambda number: number, break_first: bool = False) -> str:
    """A file of the images of one part, as data sets on the Hub have them."""
    rows = []
    for number, name in enumerate(CLASSES):
        for file in sorted((folder / part / name).glob("*.png")):
            content = file.read_bytes()
            rows.append(
                {
                    "image": {
                        "bytes": content[:50] if break_first and not rows else content,
                        "path": None,
                    }
                }
            )
            rows[-1]["label"] = label(number)
    file = folder / f"{part}.parquet"
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.Value("string")}
    )
    if isinstance(rows[0]["label"], int):
        features["label"] = datasets.ClassLabel(names=list(CLASSES))
    table = datasets.Dataset.from_list(rows, features=features).cast_column(
        "image", datasets.Image()
    )
    table.to_parquet(file)
    return str(file)


# Whole runs


@pytest.mark.slow
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
    """With the sizes of tests, which the original's words do not reach, and without the test's usual options."""
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
    best, losses = (
        torch.tensor([[3, 1, 2, 0, 4], [5, 1, 2, 0, 4], [0, 1, 2, 3, 4]]).numpy(),
        np.array([1.0, 2, 3]),
    )
    prediction = SimpleNamespace(predictions=(best, losses), label_ids=np.array([3, 4, 5]))
    expected = {"accuracy": 1 / 3, "accuracy_top5": 2 / 3, "exact_loss": 2.0}
    assert script.accuracies(prediction, 6) == pytest.approx(expected)


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
        "", script.ModelSettings, script.DataSettings, Augmentation, script.TeachingSettings, script.ImageTrainingArguments,
        argv=[*argv, "--model_overrides", SIZES, "--input_size", "28"],
    )  # fmt: skip
    trainer = script.build_trainer(*settings)
    assert trainer.model.config.patch_order == "snake" and (trainer.teacher is not None) == (
        config == "imagenet-distilled"
    )
    assert trainer.model.config.distillation_head == (config == "imagenet-distilled")


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


@pytest.mark.slow
def test_fine_tuning_at_another_resolution(folder, tmp_path):
    run(folder, tmp_path / "one", *PLAIN, "--max_steps", "25")
    first = LionForImageClassification.from_pretrained(tmp_path / "one")
    metrics = run(
        folder, tmp_path / "two", *PLAIN, "--max_steps", "1", "--learning_rate", "1e-9", "--input_size", "24",
        model=["--model_name_or_path", str(tmp_path / "one")],
    )  # fmt: skip
    assert metrics["eval_accuracy"] > 0.9
    second = LionForImageClassification.from_pretrained(tmp_path / "two")
    assert (
        second.config.image_size == 24 and second.lion.embeddings.position_embeddings.shape[1] == 37
    )
    image = torch.randn(1, 3, 24, 24)
    torch.testing.assert_close(second(image).logits, first(image).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
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


# Data


@pytest.mark.slow
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


@pytest.mark.slow
def test_corrupt_images_are_skipped_and_counted(folder, tmp_path, caplog):
    shutil.copytree(folder / "train", tmp_path / "data/train")
    shutil.copytree(folder / "validation", tmp_path / "data/test")
    (tmp_path / "data/train/red/0.png").write_bytes((folder / "train/red/0.png").read_bytes()[:100])
    (tmp_path / "data/train/red/1.png").write_bytes(b"no image")
    metrics = run(
        tmp_path / "data", tmp_path / "out", "--num_train_epochs", "1", "--repeated_aug", "1"
    )
    assert metrics["eval_loss"] > 0
    for name in ("red/0.png", "red/1.png"):
        assert any("skipped" in message and name in message for message in caplog.messages)
    assert "could not be read were replaced" in caplog.messages[-1]
    with pytest.raises(SkippedSample, match="an image of the table"):
        open_image(b"")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda root: shutil.rmtree(root / "validation"),
            "beside train/ one of val, validation, test",
        ),
        (lambda root: shutil.rmtree(root / "validation/red"), r"\['red'\] are only in .*train"),
        (
            lambda root: [shutil.rmtree(root / "train" / name) for name in CLASSES[1:]],
            "1 class folders: expected at least two",
        ),
        (
            lambda root: [file.unlink() for file in (root / "train/red").iterdir()],
            "red has no images",
        ),
        (lambda root: shutil.rmtree(root), "there is no such folder"),
        (lambda root: [shutil.rmtree(file) for file in root.iterdir()], "expected folders train/"),
    ],
    ids=[
        "no validation",
        "classes differ",
        "one class",
        "empty class",
        "no folder",
        "empty folder",
    ],
)
def test_errors_of_folders(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns("*.parquet"))
    change(tmp_path / "data")
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--input_size", "18"], "expected multiples of patch_size=4"),
        (["--model", "lion_huge_patch16_224"], "did you mean lion_"),
        (["--model", "lion-d-snak-tiny-patch16-224"], "did you mean lion-d-snake-tiny-patch16-224"),
        (["--mask_type", "Decai"], "mask_type='Decai': expected one of Lit, Decay, Selective"),
        (["--format", "Fast"], "format='Fast'"),
        (["--model", "configs/lion-d-base"], "expected a LION model for images"),
        (["--model_overrides", "hiden_size=3"], "did you mean hidden_size"),
        (["--aa", "rund-m9"], "aa='rund-m9'"),
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
        (["--label_smoothing_factor", "0.1"], "its name here is smoothing"),
        (["--smothing", "0.1"], "did you mean --smoothing"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_errors_of_settings(folder, tmp_path, argv, message, capsys):
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", *argv)
    assert message in capsys.readouterr().err


def test_errors_of_tables(folder, tmp_path):
    train = shutil.copy(parquet(folder, "train", lambda n: CLASSES[n]), tmp_path / "train.parquet")
    other = shutil.copy(
        parquet(folder, "validation", lambda n: f"dark {CLASSES[n]}"), tmp_path / "other.parquet"
    )
    with pytest.raises(ValueError, match="row 0 of test has label 'dark blue': .* 15 rows"):
        read_images(train_file=str(train), validation_file=str(other))
    with pytest.raises(ValueError, match="label_column='class': expected one of the columns"):
        read_images(train_file=str(train), validation_file=str(train), label_column="class")
    with pytest.raises(ValueError, match="validation_file='none.parquet'"):
        read_images(train_file=str(train), validation_file="none.parquet")
    with pytest.raises(ValueError, match="from nowhere"):
        read_images()


@pytest.mark.slow
def test_the_best_average_is_loaded_at_the_end(folder, tmp_path):
    options = "--load_best_model_at_end true --metric_for_best_model ema_loss --greater_is_better false --eval_strategy steps"
    options += (
        " --eval_steps 1 --save_strategy steps --save_steps 1 --max_steps 4 --learning_rate 3"
    )
    metrics = run(folder, tmp_path, *options.split(), "--model-ema", "--model_ema_decay", "0.1")
    with open(tmp_path / "curves.csv", encoding="utf-8", newline="") as file:
        losses = [
            float(row["eval_ema_loss"]) for row in csv.DictReader(file) if row["eval_ema_loss"]
        ][:3]
    assert metrics["eval_ema_loss"] == pytest.approx(min(losses)) and max(losses) > min(losses)


# Teachers


@pytest.mark.parametrize("kind", slow_except(["hard", "soft"], "hard"))
@pytest.mark.parametrize(
    "token", slow_except([False, True], True), ids=["class output", "distillation token"]
)
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


@pytest.mark.slow
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
    """A convolutional teacher, then a student that agrees with it; from the folder and from a file of weights."""
    metrics = run(
        folder,
        tmp_path / "teacher",
        *PLAIN,
        "--max_steps",
        "30",
        "--input_size",
        "32",
        model=["--model", "test_resnet"],
    )
    assert metrics["eval_accuracy"] > 0.9
    processor = image_processor(16)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "teacher")
    torch.save({"state_dict": model.timm_model.state_dict()}, tmp_path / "teacher.pth")
    images, teachers = torch.randn(2, 3, 16, 16), {}
    for name, path in (
        (str(tmp_path / "teacher"), None),
        ("test_resnet", str(tmp_path / "teacher.pth")),
    ):
        teachers[name] = load_teacher(name, path, 3, processor)(images)
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
        load_teacher("test_resnet", str(tmp_path / "teacher.pth"), 4, processor)
