"""Every training command of README.md and docs/*.md runs for two steps, on small data under its names, with a small model."""

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.pages import PAGES, ROOT, commands, text

# In order, because later commands use what earlier ones leave; what is shown on several pages runs once.
COMMANDS = []
for page in PAGES:
    COMMANDS += [
        c
        for c in commands(page)
        if any(w.startswith("run_scripts/run_") for w in c) and c not in COMMANDS
    ]

SIZES = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
EVERYWHERE = [
    "--max_steps",
    "2",
    "--report_to",
    "none",
    "--use_cpu",
    "--disable_tqdm",
    "true",
    "--bf16",
    "false",
]
EVERYWHERE += [
    "--peak_tflops",
    "1",
    "--dataloader_num_workers",
    "0",
    "--per_device_train_batch_size",
    "4",
]
IMAGES = ["--eval_strategy", "no", "--save_strategy", "no"]
# What is added to a command so that it is small: first word that a command has -> options.
SMALLER = {
    "configs/mlm/lion-s-base.yaml": ["--model_overrides", SIZES, "--total_batch_size", "8", "--validation_rows", "8",
                                     "--dataloader_num_workers", "1"],
    "run_scripts/run_mlm.py": ["--model_overrides", SIZES, "--validation_rows", "8"],
    "configs/glue.yaml": ["--data_dir", "glue"],
    "run_scripts/run_glue.py": [],
    "configs/images/imagenet-distilled.yaml": [
        *IMAGES, "--model_overrides", SIZES, "--input_size", "32", "--total_batch_size", "4",
        "--teacher_model", "resnet10t", "--teacher_path", "teacher.pth", "--no-model-ema",
    ],
    "lion_base_patch16_224": [*IMAGES, "--model_overrides", SIZES, "--input_size", "32", "--no-model-ema"],
    "configs/images/fashion-mnist.yaml": [*IMAGES, "--model_overrides", f"{SIZES},patch_size=4"],
    "outputs/fashion-mnist": IMAGES,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the data that the commands name."""
    place = tmp_path_factory.mktemp("reader")
    (place / "configs").symlink_to(ROOT / "configs")
    lines = [line for line in text("README.md").splitlines() if line.strip()]
    (place / "train.txt").write_text("\n".join(lines[:150]))
    (place / "validation.txt").write_text("\n".join(lines[150:180]))

    c4 = (
        place / "allenai" / "c4"
    )  # a folder of the data set's name, which `datasets` takes before the Hub's
    c4.mkdir(parents=True)
    for name, part in (("train", lines[:150]), ("validation", lines[150:])):
        (c4 / f"{name}.json").write_text("\n".join(json.dumps({"text": line}) for line in part))
    files = "\n".join(
        f"      - split: {name}\n        path: {name}.json" for name in ("train", "validation")
    )
    (c4 / "README.md").write_text(
        f"---\nconfigs:\n  - config_name: en\n    data_files:\n{files}\n---\n"
    )

    draw = random.Random(0)
    for file in ("reviews.csv", "held_out.csv"):
        rows = [f"the film was {draw.choice(['good', 'bad'])} {n},{n % 2}" for n in range(12)]
        (place / file).write_text("\n".join(["sentence,label", *rows]))
    from lion_hf.tasks.glue_tasks import TASKS

    for name, task in TASKS.items():
        (place / "glue" / name).mkdir(parents=True)
        for split in ("train", *(split for split, _ in task.splits)):
            rows = [dict.fromkeys(task.sentences, f"a sentence of {n} words") for n in range(6)]
            rows = [
                row | {"label": n % len(task.classes) if task.classes else n * 0.7}
                for n, row in enumerate(rows)
            ]
            (place / "glue" / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    pixels = np.random.default_rng(0)
    for data, size, parts in (
        ("imagenet", 32, ("train", "val")),
        ("fashion_mnist", 28, ("train", "test")),
    ):
        for part in parts:
            for name in "ab":
                folder = place / data / part / name
                folder.mkdir(parents=True)
                for n in range(4):
                    Image.fromarray(pixels.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(
                        folder / f"{n}.png"
                    )
    torch.save(timm.create_model("resnet10t", num_classes=2).state_dict(), place / "teacher.pth")
    return place


def main_of(script: str):
    if (
        Path(script).stem in sys.modules
    ):  # one copy of a script for all tests: checkpoints pickle its classes
        return sys.modules[Path(script).stem].main
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = sys.modules[Path(script).stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_all_scripts_are_shown():
    shown = {word for command in COMMANDS for word in command if word.startswith("run_scripts/")}
    assert shown == {f"run_scripts/{file.name}" for file in (ROOT / "run_scripts").glob("run_*.py")}
    launchers = {command[0] for command in COMMANDS}
    assert launchers == {"python", "torchrun", "accelerate"} and len(COMMANDS) >= 8


@pytest.mark.slow
def test_commands(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("lion_hf.plots.plot_curves", lambda *args, **kwargs: None)
    for command in COMMANDS:
        start = next(n for n, word in enumerate(command) if word.startswith("run_scripts/"))
        if (
            not Path("google-bert/bert-base-uncased").exists()
            and "configs/mlm/lion-s-base.yaml" in command
        ):
            Path("google-bert/bert-base-uncased").mkdir(parents=True)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(Path("outputs/my-lion", file), "google-bert/bert-base-uncased")
        small = next(options for word, options in SMALLER.items() if word in command)
        metrics = main_of(command[start])([*command[start + 1 :], *EVERYWHERE, *small])
        assert metrics, command
        output = Path(command[command.index("--output_dir") + 1])
        assert (output / "metrics.json").is_file() or (output / "results.md").is_file(), command
