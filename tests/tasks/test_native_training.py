"""`lion-hf images --native_resolution`: batches by patches, runs, continued runs, errors."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import CLASSES, SHORT, SIZES, losses, run
from support.launches import LAUNCHES, ROOT, start
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from lion_hf.auto import native_image_processor
from lion_hf.data.augmentation import (
    Augmentation,
    EvaluationTransform,
    ImageCollator,
    TrainingTransform,
)
from lion_hf.data.images import Images, count_patches, open_image
from lion_hf.data.patch_batches import PatchBatches, PatchBudget, full_batches
from lion_hf.data.samples import SkippedSample
from lion_hf.tasks import image_classification as script
from lion_hf.tasks.image_model import check_native_resolution
from lion_hf.training.speed import items_and_flops

MODEL = ["--model=lion-d-snake-tiny-patch16-224"]
MODEL += [f"--model_overrides={SIZES},image_size=16,conv_kernel_size=3"]
NATIVE = ["--native_resolution", "--max_patches=30", "--patches_per_batch=120"]
PLAIN = ["--aa=none", "--color_jitter=0", "--reprob=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of three colours and of many shapes: train/ and validation/."""
    root, generator = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for part, count in (("train", 14), ("validation", 6)):
        for number, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                height, width = generator.integers(4, 40, 2)
                pixels = generator.integers(0, 120, (height, width, 3), dtype=np.uint8)
                pixels[..., 2 - number] += 100
                Image.fromarray(pixels).save(root / part / name / f"{n}.png")
    return root


def train(folder, output, *argv: str) -> dict[str, float]:
    return run(folder, output, *NATIVE, *PLAIN, *argv, model=MODEL)


def test_a_run_and_what_it_saves(folder, tmp_path):
    metrics = train(folder, tmp_path, "--max_steps=25", "--do_predict", "--max_patches=29")
    assert metrics["eval_accuracy"] > 0.9
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    network = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert (processor.native_resolution, processor.patch_size, processor.max_patches) == (1, 4, 29)
    files = sorted((folder / "validation").glob("*/*.png"))
    right, loss = [], []
    classify = pipeline("image-classification", model=str(tmp_path))
    for file in files:  # each on its own gives what the evaluation in batches gave
        logits = network(**processor(Image.open(file), return_tensors="pt")).logits
        label = torch.tensor([network.config.label2id[file.parent.name]])
        right.append(logits.argmax(-1) == label)
        loss.append(torch.nn.functional.cross_entropy(logits, label).item())
        assert classify(str(file))[0]["label"] == network.config.id2label[logits.argmax().item()]
    assert metrics["eval_accuracy"] == pytest.approx(torch.cat(right).float().mean().item())
    assert metrics["eval_loss"] == pytest.approx(np.mean(loss), abs=1e-5)
    with open(tmp_path / "predictions.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert all(row["label"] == file.parent.name for row, file in zip(rows, files))


def test_evaluation_does_not_depend_on_the_batches(folder, tmp_path):
    train(folder, tmp_path / "run", "--max_steps=2")
    found = []
    for budget in (["--patches_per_batch=30"], ["--patches_per_batch=1000"], []):
        argv = ["--native_resolution", "--max_patches=30", *budget]
        argv += ["--do_train=false", "--do_eval", "--per_device_eval_batch_size=3"]
        output = tmp_path / f"evaluation{len(found)}"
        found.append(run(folder, output, *argv, model=["--model", str(tmp_path / "run")]))
    for name in ("eval_accuracy", "eval_loss"):
        assert [x[name] for x in found] == pytest.approx([found[0][name]] * 3, abs=1e-6)


def test_a_model_of_any_size_is_not_cropped_in_silence(folder, tmp_path, caplog):
    train(folder, tmp_path / "run", "--max_steps=2")
    argv = ["--do_train=false", "--do_eval"]
    run(folder, tmp_path / "evaluation", *argv, model=["--model", str(tmp_path / "run")])
    assert "without --native_resolution, images are cropped to one size" in caplog.text


def test_a_continued_run_gives_the_same_losses(folder, tmp_path):
    options = ["--save_strategy=steps", "--save_steps=3", "--repeated_aug=2", "--hflip=0.5"]
    options += ["--lr_scheduler_type=constant", "--warmup_steps=0"]
    train(folder, tmp_path / "whole", *options, "--max_steps=13")
    train(folder, tmp_path / "parts", *options, "--max_steps=6")
    train(folder, tmp_path / "parts", *options, "--max_steps=13")
    whole, parts = (losses(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole) == 13 and whole == parts
    for change in (["--max_patches=20"], ["--patches_per_batch=60"]):
        with pytest.raises(SystemExit, match=r"native_resolution\['.*'\] was .* and is"):
            train(folder, tmp_path / "parts", *options, "--max_steps=15", *change)
    with pytest.raises(SystemExit, match="native_resolution was .* and is gone"):
        run(folder, tmp_path / "parts", *PLAIN, *options, "--max_steps=15", model=MODEL)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_two_batches_per_step(folder, tmp_path):
    options = [*MODEL, *NATIVE, *PLAIN, *SHORT, f"--data-path={folder}", "--max_steps=7"]
    options += ["--drop_path=0"]
    script.main([*options, "--gradient_accumulation_steps=2", f"--output_dir={tmp_path / 'one'}"])
    program = str(ROOT / "run_scripts/run_image_classification.py")
    start(LAUNCHES["torchrun"][0], program, *options, f"--output_dir={tmp_path / 'two'}")
    one, two = (json.loads((tmp_path / x / "metrics.json").read_text()) for x in ("one", "two"))
    for name in ("train_loss", "eval_loss", "eval_accuracy"):
        assert two[name] == pytest.approx(one[name], abs=1e-5), name
    one, two = ([float(loss) for loss in losses(tmp_path / x)] for x in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5) and len(set(one)) == 7


def test_without_a_budget_a_batch_is_a_number_of_images(folder, tmp_path):
    options = ["--native_resolution", *PLAIN, "--max_steps=2"]
    assert run(folder, tmp_path, *options, model=MODEL)["train_loss"] > 0
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["native_resolution"] and "max_patches" not in saved


def test_pictures_that_do_not_fit_are_left_out(folder, tmp_path, caplog):
    for part in ("train", "validation"):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            for n in range(4):
                file = f"{part}/{name}/{n}.png"
                (tmp_path / file).symlink_to(folder / file)
        Image.new("RGB", (1, 100_000)).save(tmp_path / part / "red/strip.png")
        Image.new("RGB", (4, 300)).save(tmp_path / part / "red/long.png")
    metrics = train(tmp_path, tmp_path / "out", "--max_unreadable=0.4", "--num_train_epochs=2")
    assert metrics["eval_left_out"] == 2 and np.isfinite(metrics["eval_loss"])
    assert "strip.png cannot be read as an image (ValueError: image of 1 x 100000" in caplog.text
    message = "2 of 14 training images cannot be read.*long.png .*4 x 300 pixels: expected sides of"
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_patches=0"], "max_patches=0: expected an integer of at least 1"),
        (["--patches_per_batch=0"], "patches_per_batch=0: expected an integer of at least 1"),
        (["--src"], "src=True with native_resolution: expected False"),
        (["--mixup=0.2"], "mixup=0.2 with native_resolution: expected 0"),
        (["--cutmix=1"], "cutmix=1.0 with native_resolution: expected 0"),
        (["--eval_crop_ratio=1.0"], "eval_crop_ratio=1.0 with native_resolution: expected 0.875"),
        (["--train_interpolation=random"], "train_interpolation='random' with native_resolution"),
        (["--total_batch_size=16"], "total_batch_size=16 with patches_per_batch"),
        (["--native_resolution=false"], "max_patches=30 without native_resolution"),
    ],
)
def test_errors_of_settings(folder, tmp_path, argv, message, capsys):
    with pytest.raises(SystemExit):
        train(folder, tmp_path / "out", *argv)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--patches_per_batch=29"], "patches_per_batch=29 with max_patches=30: expected at least"),
        (["--input_size=16"], "input_size=16 with native_resolution: expected None"),
        (["--torch_compile"], "torch_compile=True with native_resolution: expected False"),
        (["--softmax"], "softmax=True with native_resolution: expected False"),
        (["--distillation-type=hard"], "distillation_type='hard' with native_resolution: expected"),
        (["--model=resnet10t", "--model_overrides="], "'resnet10t' with native_resolution"),
        (["--max_patches=1"], "cannot be read, which is more than max_unreadable=0.01"),
    ],
)
def test_errors_before_any_work(folder, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message):
        train(folder, tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_several_gpus_in_a_process():
    settings = script.ModelSettings(), Augmentation(native_resolution=True)
    args = SimpleNamespace(patches_per_batch=None, torch_compile=False, n_gpu=2)
    with pytest.raises(ValueError, match="native_resolution on 2 GPUs in one process: expected"):
        check_native_resolution(*settings, script.TeachingSettings(), args)


def test_a_picture_larger_than_a_batch_is_named(folder, tmp_path):
    argv = ["--native_resolution", "--patches_per_batch=20", *PLAIN]
    with pytest.raises(
        SystemExit, match=r"patches_per_batch=20: .*\.png has \d+ patches; expected"
    ):
        run(folder, tmp_path / "out", *argv, model=MODEL)
    assert not (tmp_path / "out").exists()


def test_batches_are_full_and_of_equal_number():
    counts = np.random.default_rng(0).integers(1, 20, 101)

    class Order:  # another one in each epoch
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            return iter(np.random.default_rng(self.epoch).permutation(101).tolist())

    batches = PatchBatches(Order(), counts, 40)
    for _ in range(5):
        epoch = list(batches)
        assert len(epoch) == len(batches) == len(list(full_batches(range(101), counts, 40)))
        sizes = [counts[batch].sum() for batch in epoch]
        assert max(sizes) <= 40 and min(sizes) > 40 - 20
        seen = sum(epoch, [])
        assert len(set(seen[:101])) == min(len(seen), 101)  # none twice before all have been
    shared = [list(PatchBatches(range(101), counts, 40, n, 3)) for n in range(3)]
    assert [len(x) for x in shared] == [-(-len(batches) // 3)] * 3
    dealt = [batch for round_ in zip(*shared) for batch in round_]
    assert dealt[: len(batches) - 1] == list(full_batches(range(101), counts, 40))[:-1]


def test_batches_of_evaluation_hold_every_picture_once(folder):
    files = sorted(map(str, folder.glob("train/*/*.png")))
    images = Images(files, [0] * len(files), CLASSES)
    budget = PatchBudget((4, 30), 120)
    assert sum(budget.evaluation(images), []) == list(range(len(files)))
    processor = native_image_processor(4, 30)
    expected = [len(processor(open_image(file))["pixel_values"]) for file in files]
    assert budget.counts(images).tolist() == expected
    assert [count_patches(file, (4, 30)) for file in files] == expected


def test_training_sees_what_evaluation_sees_without_augmentation(folder):
    plain = Augmentation(
        native_resolution=True, aa="none", color_jitter=0, hflip=0, reprob=0, smoothing=0
    )
    processor = native_image_processor(4, 30)
    train, evaluate = TrainingTransform(plain, 16, processor), EvaluationTransform(processor)
    for file in sorted(folder.glob("train/red/*.png")):
        one, two = train((str(file), 2)), evaluate((str(file), 2))
        assert torch.equal(one["spatial_shapes"], two["spatial_shapes"])
        error = (one["pixel_values"] - two["pixel_values"]).abs()
        assert error.mean() < 0.01  # resized by Pillow and by torch, which round differently
    rows = [train((str(file), 2)) for file in sorted(folder.glob("train/red/*.png"))[:3]]
    batch = ImageCollator(3, plain)(rows)
    assert len(batch["labels"]) == len(batch["spatial_shapes"]) == 3
    assert batch["spatial_shapes"].prod(1).sum() == len(batch["pixel_values"])


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original", "3a"])
def test_augmentation_keeps_the_shape(aa):
    augmentation = Augmentation(native_resolution=True, aa=aa, reprob=1.0)
    processor = native_image_processor(4)
    augment = TrainingTransform(augmentation, 16, processor)
    for size in ((36, 9), (8, 30), (4, 4)):
        image = Image.fromarray(np.random.randint(0, 255, (*size[::-1], 3), dtype=np.uint8))
        row = augment((image, 0))
        expected = processor(image)["spatial_shapes"]
        assert torch.equal(row["spatial_shapes"], expected)
        assert row["pixel_values"].shape == (expected.prod(), 48)


def test_what_is_too_small_is_skipped():
    with pytest.raises(SkippedSample, match="image of 3 x 9 pixels: expected at least a patch"):
        open_image(Image.new("RGB", (3, 9)), native=(4, None))


def test_images_and_operations_of_a_batch(folder, tmp_path):
    from support.models import image_config, model

    network = model("ImageClassification", image_config())
    images = torch.zeros(2, 3, 16, 16)
    expected = items_and_flops(network, {"pixel_values": images})
    shapes = torch.tensor([[4, 4], [4, 4]])
    packed = {"pixel_values": torch.zeros(32, 48), "spatial_shapes": shapes}
    assert items_and_flops(network, packed) == expected
