"""The checks around the code: what CI, pre-commit and pytest's selections run."""

import os
import re

import pytest
import yaml
from packaging.version import Version
from support.marks import selection
from support.pages import text


def test_pre_commit_runs_the_checks_of_ci():
    """All of those that take seconds, with the same words."""
    lines = text(".ci/run").splitlines()
    checks = {line.removeprefix("check ") for line in lines if line.startswith("check .venv/bin/")}
    checks = {check for check in checks if "pytest" not in check}
    (local,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert {hook["entry"] for hook in local["hooks"]} == checks
    assert len(checks) >= 3


def test_ci_runs_every_test():
    """The README's line runs the tests that are not slow, and CI then runs the others."""
    assert 'addopts = ["-m", "not slow"]' in text("pyproject.toml")
    assert "check .venv/bin/python -m pytest -n 2 -m slow" in text(".ci/run")


@pytest.mark.parametrize(
    "given, run",
    [
        ("", "not gpu"),
        ("slow", "(slow) and not gpu"),
        ("not slow", "(not slow) and not gpu"),
        ("gpu", "gpu"),
        ("gpu and not slow", "gpu and not slow"),
        ("hf_suite", "(hf_suite) and not gpu"),
    ],
)
def test_tests_for_a_gpu_run_only_by_name(given, run):
    assert selection(given) == run
    assert selection(run) == run  # the processes of `-n 2` get the first one's expression


def test_the_lowest_versions_are_those_of_the_package():
    """constraints/lowest.txt holds each bound of pyproject.toml, and torchvision's of its torch."""
    project = text("pyproject.toml")
    dependencies = project[project.index("dependencies = [") : project.index("]\n\n[project.opt")]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', dependencies))
    lowest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text("constraints/lowest.txt"), re.MULTILINE))
    assert lowest.pop("torchvision")
    assert bounds.keys() == lowest.keys() and len(bounds) >= 8
    for name, bound in bounds.items():
        assert Version(lowest[name]) == Version(bound), name


def test_no_test_reaches_for_the_hub():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
