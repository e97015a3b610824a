"""The code of the README runs, block by block, as a reader would run it."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from lion_hf import cli

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_code_of_the_readme(tmp_path, monkeypatch):
    """All Python blocks in one namespace, and the conversion in between, in a copy of what they read."""
    for name in ("configs", "tests/reference/vision-selective-s-pos"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    namespace, ran = {}, 0
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), namespace)
            ran += 1
        elif block.startswith("lion-hf convert"):
            assert cli.main(shlex.split(block)[1:]) == 0
    assert ran >= 7
    assert namespace["logits"].shape == (1, 1000) and len(namespace["answers"]) == 4


def test_commands_of_the_readme_name_files_that_exist():
    commands = "\n".join(block for language, block in BLOCKS if language == "bash")
    for path in re.findall(r"(?:run_scripts|tests|configs)/[\w./-]+", commands):
        assert (ROOT / path).exists(), path
    assert '".[demo]"' in commands and '".[test]"' in commands


def test_ci_runs_the_command_of_the_readme():
    """What .ci/run takes out of the README is the one line that installs and tests."""
    (pattern,) = re.findall(r"grep -m 1 -F '(.+)' README.md", (ROOT / ".ci/run").read_text())
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if pattern in line)
    assert line.startswith("python -m venv") and line.endswith("-m pytest -n 2")


def test_results_of_training_stand_in_the_report():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme[readme.index("**What they reached here**") : readme.index("**Several processes.**")]
    report = (ROOT / "benchmarks/results/training.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(rows) >= 10 and not [row for row in rows if row not in report]
