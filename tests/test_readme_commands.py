"""Every training command of the pages runs for two steps, on small data, with a small model."""

import json
import random
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.pages import PAGES, ROOT, TRAINING, commands, task_of, text

from lion_hf import cli
from lion_hf.tasks.glue_tasks import TASKS
from lion_hf.training.run import EVALUATION_FILE

# In order, because later commands use what earlier ones leave. What is shown twice runs once. The
# guide to training comes first: other pages go on from its models.
COMMANDS = []
for page in sorted(PAGES, key=lambda page: page != "docs/training.md"):
    COMMANDS += [c for c in commands(page) if task_of(c) and c not in COMMANDS]

SIZES = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
EVERYWHERE = (
    "--max_steps 2 --report_to none --use_cpu --disable_tqdm true --bf16 false --peak_tflops 1"
    " --dataloader_num_workers 0 --per_device_train_batch_size 4"
)
IMAGES = "--eval_strategy no --save_strategy no"
# What makes a command small: the first part of a command that fits -> options.
SMALLER = {
    "--config mlm/lion-s-base": f"--model_overrides {SIZES} --total_batch_size 8"
    " --validation_rows 8 --dataloader_num_workers 1",
    "--config mlm/modern-base-1024": f"--model_overrides {SIZES} --total_batch_size 8"
    " --validation_rows 8 --dataloader_num_workers 1 --max_length 64 --warmup_steps 0"
    ' --lr_scheduler_kwargs {"num_decay_steps":1}',
    "--config mlm/modern-base": f"--model_overrides {SIZES} --total_batch_size 8"
    " --validation_rows 8 --dataloader_num_workers 1",
    "--sequence_parallel_size 2": f"--model_overrides {SIZES} --validation_rows 8 --max_length 64"
    " --sequence_parallel_size 1",
    "mlm": f"--model_overrides {SIZES} --validation_rows 8",
    "--config glue": "--data_dir glue",
    "glue": "",
    "--config images/imagenet-distilled": f"{IMAGES} --model_overrides {SIZES} --input_size 32"
    " --total_batch_size 4 --teacher_model resnet10t --teacher_path teacher.pth --no-model-ema",
    "lion_base_patch16_224": f"{IMAGES} --model_overrides {SIZES} --input_size 32 --no-model-ema",
    "--config images/fashion-mnist": f"{IMAGES} --model_overrides {SIZES},patch_size=4",
    "outputs/fashion-mnist": IMAGES,
    "--native_resolution": f"{IMAGES} --model_overrides {SIZES} --max_patches 16"
    " --patches_per_batch 64",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the data that the commands name."""
    place = tmp_path_factory.mktemp("reader")
    write_documents(place)
    write_sentences(place)
    write_images(place)
    torch.save(timm.create_model("resnet10t", num_classes=2).state_dict(), place / "teacher.pth")
    return place


def write_documents(place: Path) -> None:
    """Lines of our own pages, as files and under the name of C4."""
    pages = text("README.md") + text("docs/training.md")
    lines = [line for line in pages.splitlines() if line.strip()]
    (place / "train.txt").write_text("\n".join(lines[:150]))
    (place / "validation.txt").write_text("\n".join(lines[150:180]))

    c4 = place / "allenai" / "c4"  # `datasets` takes a folder of this name before the Hub's
    c4.mkdir(parents=True)
    for name, part in (("train", lines[:150]), ("validation", lines[150:])):
        (c4 / f"{name}.json").write_text("\n".join(json.dumps({"text": line}) for line in part))
    files = "\n".join(
        f"      - split: {name}\n        path: {name}.json" for name in ("train", "validation")
    )
    (c4 / "README.md").write_text(
        f"---\nconfigs:\n  - config_name: en\n    data_files:\n{files}\n---\n"
    )


def write_sentences(place: Path) -> None:
    """Reviews, and every task of GLUE."""
    draw = random.Random(0)
    for file in ("reviews.csv", "held_out.csv"):
        rows = [f"the film was {draw.choice(['good', 'bad'])} {n},{n % 2}" for n in range(12)]
        (place / file).write_text("\n".join(["sentence,label", *rows]))
    for name, task in TASKS.items():
        (place / "glue" / name).mkdir(parents=True)
        for split in ("train", *(split for split, _ in task.splits)):
            rows = [dict.fromkeys(task.sentences, f"a sentence of {n} words") for n in range(6)]
            rows = [
                row | {"label": n % len(task.classes) if task.classes else n * 0.7}
                for n, row in enumerate(rows)
            ]
            (place / "glue" / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_images(place: Path) -> None:
    """Noise in two classes, as ImageNet, as Fashion-MNIST and as photographs of several sizes."""
    pixels = np.random.default_rng(0)
    data = {
        "imagenet": ((32, 32), ("train", "val")),
        "fashion_mnist": ((28, 28), ("train", "test")),
        "photographs": ((40, 72), ("train", "val")),
    }
    for name, (sizes, parts) in data.items():
        for folder in (place / name / part / label for part in parts for label in "ab"):
            folder.mkdir(parents=True)
            for n in range(4):
                image = pixels.integers(0, 255, (sizes[n % 2], sizes[0], 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{n}.png")


def test_all_commands_and_scripts_are_shown():
    assert {task_of(command)[0] for command in COMMANDS} == set(TRAINING)
    assert {command[0] for command in COMMANDS} == {"lion-hf", "torchrun", "accelerate"}
    assert len(COMMANDS) >= 9
    scripts = [file.name for file in (ROOT / "run_scripts").glob("run_*.py")]
    assert len(scripts) == 3 and all(f"{name}`" in text("README.md") for name in scripts)


@pytest.mark.slow
def test_commands(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("lion_hf.plots.plot_curves", lambda *args, **kwargs: None)
    for command in COMMANDS:
        name, words = task_of(command)
        # Their tokenizer is on the Hub: here, it is that of the run before.
        if {"mlm/modern-base", "mlm/lion-s-base"} & set(words):
            tokenizer = Path("google-bert/bert-base-uncased")
            tokenizer.mkdir(parents=True, exist_ok=True)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(Path("outputs/my-lion", file), tokenizer)
        line = " ".join([name, *words])
        small = next(options for part, options in SMALLER.items() if part in line)
        task = import_module(cli.TASKS[name][0])
        assert task.main([*words, *EVERYWHERE.split(), *small.split()]), command
        output = Path(command[command.index("--output_dir") + 1])
        results = ("metrics.json", "results.md", EVALUATION_FILE)
        assert any((output / name).is_file() for name in results), command
