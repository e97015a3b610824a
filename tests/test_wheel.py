"""The source archive and the wheel: what is inside, and that the wheel alone runs and trains."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.archives import unpack
from support.pages import ROOT

from lion_hf import cli, presets

pytestmark = pytest.mark.slow

SOURCES = ("README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py")
FOLDERS = ("lion_hf", "configs", "model_cards")
COMMANDS = ("mlm", "glue", "images", "linearize", "convert", "export", "publish", "demo")
SMALL = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
QUICK = "--max_steps 3 --report_to none --use_cpu --disable_tqdm true --dataloader_num_workers 1"


def clone_files() -> set[str]:
    """The files of the clone that ship."""
    files = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))
    return {
        file.relative_to(ROOT).as_posix()
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }


def build(kind: str, folder: Path, output: Path) -> Path:
    """Calls setuptools as pip does, without fetching anything: `kind` is "sdist" or "wheel"."""
    output.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    (file,) = output.iterdir()
    return file


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The source archive of a copy of the clone, so that nothing is left in the clone."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return build("sdist", folder, folder / "dist")


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory) -> Path:
    """The wheel that pip would make of the source archive."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as file:
        unpack(file, folder)
    (unpacked,) = folder.iterdir()
    return build("wheel", unpacked, folder / "dist")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs Python in a folder of its own, where lion_hf is the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(folder / "packages")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    (folder / "work").mkdir()
    # With -S no .pth file is read, so that an editable install of the clone is out of reach.
    paths = [str(folder / "packages"), *{sysconfig.get_path(x) for x in ("purelib", "platlib")}]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def run(*words: str) -> subprocess.CompletedProcess:
        finished = subprocess.run(
            [sys.executable, "-S", *words],
            cwd=folder / "work",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        return finished

    run.packages, run.work, run.script = (
        folder / "packages",
        folder / "work",
        str(folder / "packages" / "bin" / "lion-hf"),
    )
    return run


def test_the_wheel_holds_every_file_that_ships(wheel):
    """Every preset, recipe and model card, the mark of type hints, and nothing else."""
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if ".dist-info/" not in name}
    files = clone_files()
    expected = {name if name.startswith("lion_hf/") else f"lion_hf/{name}" for name in files}
    assert {"lion_hf/py.typed", "lion_hf/configs/mlm/lion-s-base.yaml"} < expected
    assert inside == expected


def test_the_source_archive_holds_what_the_wheel_is_made_of(archive):
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert clone_files() | set(SOURCES) <= inside
    assert not [name for name in inside if name.startswith("tests")]


def test_the_clone_is_out_of_reach(installed):
    """lion_hf is that of the wheel, with its presets and recipes, and no module is the clone's."""
    code = (
        "import json, sys, lion_hf, lion_hf.presets as p; "
        "places = [str(getattr(m, '__file__', '')) for m in list(sys.modules.values())]; "
        "print(json.dumps([lion_hf.__file__, p.preset_names(), p.recipe_names(), places]))"
    )
    file, preset_names, recipe_names, places = json.loads(installed("-c", code).stdout)
    assert Path(file).is_relative_to(installed.packages)
    assert not [place for place in places if place.startswith(f"{ROOT}/lion_hf")]
    assert (preset_names, recipe_names) == (presets.preset_names(), presets.recipe_names())


# Prints what every command's --help prints; in one process, because imports take most of the time.
HELPS = """
import contextlib, io, json, sys
from lion_hf.cli import main
printed = {}
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([command, "--help"])
    printed[command] = text.getvalue()
print(json.dumps(printed))
"""


def test_help(installed):
    listed = installed(installed.script, "--help").stdout
    assert {"convert", "export", "linearize", "publish", *cli.TASKS} == set(COMMANDS)
    for command, printed in json.loads(installed("-c", HELPS, *COMMANDS).stdout).items():
        assert printed.startswith(f"usage: lion-hf {command}")
        assert command in listed


def write_data(folder: Path) -> None:
    """Text, a folder in the place of C4, one task of GLUE, and images."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.strip()]
    for name, part in (("train", lines[:60]), ("validation", lines[60:90])):
        (folder / f"{name}.txt").write_text("\n".join(part))
        c4 = folder / "allenai" / "c4" / "en"
        c4.mkdir(parents=True, exist_ok=True)
        rows = "\n".join(json.dumps({"text": line}) for line in part)
        (c4 / f"{name}.json").write_text(rows)
    files = "".join(
        f"      - split: {name}\n        path: en/{name}.json\n" for name in ("train", "validation")
    )
    card = f"---\nconfigs:\n  - config_name: en\n    data_files:\n{files}---\n"
    (folder / "allenai" / "c4" / "README.md").write_text(card)
    for name in ("train", "validation"):
        rows = [{"sentence": f"film {n}", "label": n % 2} for n in range(8)]
        (folder / "glue" / "sst2").mkdir(parents=True, exist_ok=True)
        (folder / "glue" / "sst2" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pixels = np.random.default_rng(0)
    for name in ("train/a", "train/b", "validation/a", "validation/b"):
        (folder / "images" / name).mkdir(parents=True)
        for n in range(4):
            noise = pixels.integers(0, 255, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "images" / name / f"{n}.png")


TRAININGS = {
    "mlm": f"mlm --model lion-s-base --model_overrides {SMALL} --train_tokenizer --vocab_size 300 "
    "--train_file train.txt --validation_file validation.txt --per_device_train_batch_size 4 "
    "--max_length 32",
    "recipe": f"mlm --config mlm/lion-s-base --model_overrides {SMALL},vocab_size=300 "
    "--tokenizer outputs/mlm --validation_rows 8 --total_batch_size 8 "
    "--per_device_train_batch_size 4 --bf16 false",
    "glue": "glue --config glue --task sst2 --data_dir glue --model_name_or_path outputs/mlm",
    "images": "images --config images/fashion-mnist --data-path images --eval_strategy no "
    "--save_strategy no --per_device_train_batch_size 4",
}


def test_the_three_training_commands(installed):
    """Presets and recipes are found by name, far from the clone; GLUE starts from the first run."""
    write_data(installed.work)
    for name, command in TRAININGS.items():
        words = [*command.split(), *QUICK.split(), "--output_dir", f"outputs/{name}"]
        installed(installed.script, *words)
        output = installed.work / "outputs" / name
        assert list(output.rglob("metrics.json")), name
        assert list(output.rglob("model.safetensors")), name
