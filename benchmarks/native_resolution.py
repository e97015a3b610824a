"""Images of many shapes as they are, and as squares: accuracy and time of training on a CPU.

    python benchmarks/native_resolution.py clothes FASHION_MNIST OUTPUT
    python benchmarks/native_resolution.py photographs OUTPUT
    python benchmarks/native_resolution.py large OUTPUT [--preset P]
    python benchmarks/native_resolution.py steps OUTPUT

`clothes` scales and crops the pictures of Fashion-MNIST (train/ and test/, one folder per class) to
random sizes and shapes. `photographs` does so with parts of the photographs that matplotlib,
scikit-learn and scikit-image ship; a picture's class is the photograph that it comes from. Both
write the pictures to OUTPUT/data, the same for every arm, and train a small LION-D on them: as
squares (`lion-hf images` as usual: the shorter side resized, a crop of the middle), and with
--native_resolution and at most as many patches as a square has. The two arms run side by side,
each in a process with one thread. `large` classifies one picture of 4,096 x 4,096 pixels. `steps`
times forward and backward passes on 64 pictures of 6 x 6 to 12 x 12 patches, each beside one on 64
squares with about as many patches; times are medians of 3, after one that does not count. The rows
of the report are printed, and appended to OUTPUT/rows.md.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import anonymous_peak, in_turns
from PIL import Image

SMALL = "num_attention_heads=2,hidden_act=relu,initializer_range=0.12,num_hidden_layers=4"
HEAD = """| pictures | arm | patches per picture | test accuracy (%) | CPU s, training |
|---|---|---:|---:|---:|"""
LARGE_HEAD = """| model | parameters | patches | CPU s | memory (MiB) |
|---|---:|---:|---:|---:|"""
STEPS_HEAD = """| model | convolution | patches | packed (CPU s) | squares (CPU s) | ratio |
|---|---|---:|---:|---:|---:|"""
# What the tasks' arms have in common, and the side of a square in patches.
TASKS = {
    "clothes": (
        f"{SMALL},hidden_size=64,intermediate_size=128,patch_size=4,image_size=28",
        ["--num_train_epochs=4", "--batch_size=64", "--learning_rate=3e-3", "--hflip=0"],
        7,
    ),
    "photographs": (
        f"{SMALL},hidden_size=64,intermediate_size=128,patch_size=16,image_size=192",
        ["--num_train_epochs=8", "--batch_size=32", "--learning_rate=2e-3", "--hflip=0"],
        12,
    ),
}
PHOTOGRAPHS = {
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "skimage": [
        "data/astronaut.png",
        "data/brick.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/gravel.png",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/motorcycle_left.png",
        "data/retina.jpg",
        "data/rocket.jpg",
    ],
}
COMMON = [
    *("--model=lion-d-snake-tiny-patch16-224", "--drop_path=0", "--aa=none", "--color_jitter=0"),
    *("--reprob=0", "--mixup=0", "--cutmix=0", "--repeated_aug=1", "--min_lr=0", "--use_cpu"),
    *("--warmup_steps=0.1", "--adam_beta2=0.98", "--no_model_ema", "--eval_strategy=no"),
    *("--save_strategy=no", "--report_to=none", "--disable_tqdm=true", "--logging_steps=100"),
]


def shaped(
    image: Image.Image, generator: np.random.Generator, scales: tuple[float, float]
) -> Image.Image:
    """A random part of a scaled picture: 60 to 100 % of its height, and of its width."""
    scale = float(np.exp(generator.uniform(*np.log(scales))))
    size = [max(16, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    part = [round(side * generator.uniform(0.6, 1.0)) for side in size]
    left, top = (int(generator.integers(0, a - b + 1)) for a, b in zip(size, part))
    return image.crop((left, top, left + part[0], top + part[1]))


def make_clothes(source: Path, target: Path, counts: dict[str, int]) -> None:
    """Writes the first pictures of each class of Fashion-MNIST, scaled by 0.7 to 1.6, cropped."""
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        for folder in sorted((source / part).iterdir()):
            (target / part / folder.name).mkdir(parents=True)
            for file in sorted(folder.glob("*.png"))[:count]:
                image = shaped(Image.open(file), generator, (0.7, 1.6))
                image.save(target / part / folder.name / file.name)


def photographs() -> list[Path]:
    """The photographs of the packages that are installed."""
    found = []
    for package, files in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                f"photographs need {package}: pip install matplotlib scikit-learn scikit-image"
            )
        found += [Path(spec.submodule_search_locations[0], file) for file in files]
    return found


def make_photographs(_: Path, target: Path, counts: dict[str, int]) -> None:
    """Writes random parts of each photograph: a third to all of each side, scaled by 0.5 to 1."""
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        for file in photographs():
            photograph = Image.open(file).convert("RGB")
            (target / part / file.stem).mkdir(parents=True)
            for n in range(count):
                side = [int(x * generator.uniform(1 / 3, 1)) for x in photograph.size]
                left, top = (
                    int(generator.integers(0, a - b + 1)) for a, b in zip(photograph.size, side)
                )
                image = photograph.crop((left, top, left + side[0], top + side[1]))
                image = shaped(image, generator, (0.5, 1.0))
                image.save(target / part / file.stem / f"{n}.png")


MAKERS = {
    "clothes": (make_clothes, {"train": 600, "test": 200}),
    "photographs": (make_photographs, {"train": 40, "test": 20}),
}


def train(task: str, native: bool, output: Path) -> str:
    """Trains one arm; returns its row."""
    from lion_hf.data.images import count_patches, visible_files
    from lion_hf.tasks.image_classification import main

    torch.set_num_threads(1)
    fields, options, side = TASKS[task]
    argv = [*COMMON, *options, f"--model_overrides={fields}", f"--data_path={output / 'data'}"]
    patch, most = (int(fields.split("patch_size=")[1].split(",")[0]), side * side)
    mean = float(most)
    if native:
        argv += ["--native_resolution", f"--max_patches={most}"]
        files = visible_files(output / "data/train", (".png",))
        mean = float(np.mean([count_patches(file, (patch, most)) for file in files]))
    else:
        argv += ["--src", "--src_padding=0", "--eval_crop_ratio=1.0"]
    name = "native" if native else "squares"
    start = time.process_time()
    metrics = main([*argv, f"--output_dir={output / name}"])
    seconds = time.process_time() - start
    accuracy = 100 * metrics["eval_accuracy"]
    return f"| {task} | {name} | {mean:.1f} | {accuracy:.1f} | {seconds:,.0f} |"


def large(preset: str) -> str:
    """Classifies a picture of 4,096 x 4,096 pixels; returns its row."""
    import lion_hf
    from lion_hf.auto import native_image_processor
    from lion_hf.presets import find_preset

    torch.set_num_threads(1)
    config = lion_hf.LionConfig.from_pretrained(find_preset(preset))
    model = lion_hf.LionForImageClassification(config).eval()
    pixels = np.random.default_rng(0).integers(0, 255, (4096, 4096, 3), dtype=np.uint8)
    processor = native_image_processor(config.patch_size)
    inputs = processor(Image.fromarray(pixels), return_tensors="pt")
    found = []
    start = time.process_time()
    with torch.inference_mode():
        memory = anonymous_peak(lambda: found.append(model(**inputs).logits))
    seconds = time.process_time() - start
    assert found[0].isfinite().all()
    patches = len(inputs["pixel_values"])
    parameters = model.num_parameters()
    return f"| {preset} | {parameters:,} | {patches:,} | {seconds:,.0f} | {memory:,.0f} |"


def steps(mask_type: str, width: int | None) -> str:
    """Times a small model's steps on pictures of different sizes and on squares; a row."""
    import lion_hf

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randint(6, 13, (64, 2), generator=generator)
    patches = int(shapes.prod(1).sum())
    side = round((patches / 64) ** 0.5)
    pixels = torch.randn(patches, 48, generator=generator)
    arms = {
        "packed": {"pixel_values": pixels, "spatial_shapes": shapes},
        "squares": {"pixel_values": torch.randn(64, 3, 4 * side, 4 * side, generator=generator)},
    }
    config = lion_hf.LionConfig(
        modality="image", mask_type=mask_type, patch_order="snake", conv_kernel_size=width,
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        patch_size=4, image_size=36, num_labels=10, classifier_pooling="mean",
    )  # fmt: skip
    model = lion_hf.LionForImageClassification(config).train()

    def pass_both_ways(inputs: dict[str, torch.Tensor]) -> None:
        model.zero_grad()
        model(**inputs, labels=torch.arange(64) % 10).loss.backward()

    calls = {name: partial(pass_both_ways, inputs) for name, inputs in arms.items()}
    one, squares = (statistics.median(seconds) for seconds in in_turns(calls, 3).values())
    of_squares = 64 * side * side
    return (
        f"| {mask_type} | {width or 'none'} | {patches:,}, {of_squares:,} | {one:.2f} |"
        f" {squares:.2f} | {one / squares:.2f} |"
    )


def write(rows: list[str], output: Path) -> None:
    """Prints the rows of a report, and appends them to the file."""
    with open(output / "rows.md", "a", encoding="utf-8") as file:
        print(*rows, sep="\n", file=file)
    print(*rows, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=[*TASKS, "large", "steps"])
    parser.add_argument("paths", nargs="+", type=Path, help="the source, if any, and OUTPUT")
    parser.add_argument("--preset", default="lion-s-snake-tiny-patch16-224")
    parser.add_argument("--arm", choices=("squares", "native", "large"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    output = args.paths[-1]
    if args.arm is not None:
        row = (
            large(args.preset)
            if args.arm == "large"
            else train(args.task, args.arm == "native", output)
        )
        (output / f"{args.arm}.json").write_text(json.dumps(row))
        return
    output.mkdir(parents=True, exist_ok=True)
    if args.task == "steps":
        rows = [
            STEPS_HEAD,
            *(steps(x, width) for width in (None, 3) for x in ("selective", "decay")),
        ]
        write(rows, output)
        return
    if args.task != "large" and not (output / "data").is_dir():
        make, counts = MAKERS[args.task]
        make(args.paths[0], output / "data", counts)
    rows = [LARGE_HEAD if args.task == "large" else HEAD]
    arms = ("large",) if args.task == "large" else ("squares", "native")
    runs = [subprocess.Popen([sys.executable, *sys.argv, "--arm", arm]) for arm in arms]
    for arm, process in zip(arms, runs):
        if process.wait() != 0:
            raise SystemExit(f"{arm} failed: its error stands above")
        rows.append(json.loads((output / f"{arm}.json").read_text()))
    write(rows, output)


if __name__ == "__main__":
    main()
