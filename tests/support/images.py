"""Tiny pictures, folders of them, and runs of `lion-hf images` on them."""

import csv
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from lion_hf.tasks import image_classification as script

CLASSES = ("blue", "green", "red")
SIZES = (
    "hidden_size=24,num_hidden_layers=2,num_attention_heads=2,intermediate_size=48,patch_size=4,"
    "initializer_range=0.2"
)
MODEL = ["--model=lion-d-snake-tiny-patch16-224", "--input_size=16", f"--model_overrides={SIZES}"]
SHORT = [
    *("--batch-size=8", "--learning_rate=3e-3", "--report_to=none", "--use_cpu"),
    *("--disable_tqdm=true", "--logging_steps=1", "--eval_strategy=no", "--save_strategy=no"),
    "--no-model-ema",
]
# No augmentation: three colours are learnt in a few steps.
PLAIN = [
    *("--aa=none", "--color_jitter=0", "--src", "--reprob=0", "--mixup=0", "--cutmix=0"),
]


def noise(seed: int, size: tuple[int, int] = (20, 18)) -> Image.Image:
    """A picture (width, height) of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture(colour: int, generator: np.random.Generator) -> Image.Image:
    """Noise with a tinge of the class's colour."""
    pixels = generator.integers(0, 120, (18, 20, 3), dtype=np.uint8)
    pixels[..., 2 - colour] += 100
    return Image.fromarray(pixels)


def image_folder(folder: Path, counts: tuple[int, int] = (12, 5)) -> Path:
    """Fills a folder with train/ and validation/, each with a folder per colour."""
    generator = np.random.default_rng(0)
    for part, count in zip(("train", "validation"), counts):
        for number, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                picture(number, generator).save(folder / part / name / f"{n}.png")
    return folder


def parquet(folder: Path, part: str, label=lambda number: number, null_first: bool = False) -> str:
    """Writes the images of one part as data sets on the Hub have them; returns the file's path."""
    rows = []
    for number, name in enumerate(CLASSES):
        for file in sorted((folder / part / name).glob("*.png")):
            image = {"bytes": file.read_bytes(), "path": None}
            rows.append({"image": image, "label": label(number)})
    if null_first:
        rows[0]["image"] = None
    text = isinstance(rows[0]["label"], str)
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.Value("string") if text else datasets.ClassLabel(names=[*CLASSES]),
        }
    )
    file = folder / f"{part}.parquet"
    table = datasets.Dataset.from_list(rows, features=features)
    table.cast_column("image", datasets.Image()).to_parquet(file)
    return str(file)


def run(
    folder: Path, output: Path, *argv: str, model: list[str] = MODEL, data: list[str] | None = None
) -> dict[str, float]:
    """Runs `lion-hf images` in this process; returns its metrics."""
    data = data or ["--data-path", str(folder)]
    return script.main([*model, *data, *SHORT, "--output_dir", str(output), *argv])


def losses(output: Path) -> list[str]:
    """The losses of all steps, as they stand in the run's table."""
    with open(output / "curves.csv", encoding="utf-8", newline="") as file:
        return [row["loss"] for row in csv.DictReader(file) if row["loss"]]
