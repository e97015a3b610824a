"""The benchmarks: reports of a quick run, nothing timed on wrong results, and messages."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import PAGES, text
from tqdm import tqdm

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def measure():
    """The module beside the script."""
    spec = importlib.util.spec_from_file_location("measure", FOLDER / "measure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["measure"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, FOLDER / "run.py", *arguments], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_quick_run_of_everything(tmp_path):
    """Every suite leaves JSON, table and plot, and each ratio is that of the times beside it."""
    finished = run("all", "--quick", "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-2000:]
    for suite in ("op", "model", "train", "memory", "training-memory", "chunks", "forms"):
        report = json.loads((tmp_path / f"{suite}-cpu.json").read_text())
        assert report["rows"] and report["about"]["torch"] and "--quick" in report["about"]["command"]
        for row in report["rows"]:
            assert all(value >= 0 for value in row["values"].values())
            assert (row["baseline"] is None) == suite.endswith("memory")
            for name, (low, middle, high) in row["ratios"].items():
                assert low <= middle <= high
                assert 0.05 < middle / (row["values"][name] / row["values"][row["baseline"]]) < 20  # other jobs may run beside
                assert name in row["values"] and name != row["baseline"]
        table = (tmp_path / f"{suite}-cpu.md").read_text()
        assert table in finished.stdout and "| length |" in table
        assert (tmp_path / f"{suite}-cpu.png").stat().st_size > 5000


@pytest.mark.slow
def test_quick_run_of_the_errors(tmp_path):
    """Every family, type and form stands in the report, in float32 nearly exact and in half precision not."""
    command = [sys.executable, FOLDER / "precision.py", "--quick", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    report = json.loads((tmp_path / "precision-cpu.json").read_text())
    found = {(row["family"], row["form"], row["dtype"], row["normalize"]) for row in report["operation"]}
    assert len(found) == 3 * 3 * 3 * 2 and len(report["models"]) == 8 * 7
    for row in report["operation"]:
        assert ("query" in row["errors"]) and 1e-9 < row["errors"]["output"][0] < (2e-6 if row["dtype"] == "float32" else 4e-3)
    assert max(row["errors"]["output"][0] for row in report["operation"] if row["dtype"] == "bfloat16") > 1e-3
    table = (tmp_path / "precision-cpu.md").read_text()
    assert table in finished.stdout and "--quick" in table and "| bfloat16 | recurrent | 64 |" in table
    assert (tmp_path / "precision-cpu.png").stat().st_size > 5000


def test_nothing_is_timed_on_a_red_check(measure):
    def check():
        raise AssertionError("results differ")

    called = []
    group = measure.Group("suite", 8, "forward", {"ours": lambda: called.append(1)}, None, check)
    with pytest.raises(AssertionError, match="results differ"), tqdm(disable=True) as progress:
        measure.time_group(group, "cpu", 0, progress)
    assert not called


def test_ratios_are_those_of_the_times(measure):
    """A function that does the work five times takes longer than one that does it once, by about that."""
    x = torch.randn(300, 300)
    functions = {"five": lambda: [x @ x for _ in range(5)], "one": lambda: x @ x}
    with tqdm(disable=True) as progress:
        row = measure.time_group(measure.Group("s", 8, "product", functions, "one", lambda: None), "cpu", 0.5, progress)
    assert 2 < row.ratios["five"][1] < 12 and "one" not in row.ratios and row.repeats >= 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["op", "--lengths", "0"], "--lengths 0: expected integers of at least 1"),
        (["op", "--output", __file__], f"--output {__file__}: this path is or goes through a file"),
        (["ops"], "invalid choice: 'ops'"),
        pytest.param(
            ["op", "--device", "cuda"],
            "torch finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_mistakes(arguments, message):
    finished = run(*arguments)
    assert finished.returncode != 0 and message in finished.stderr and finished.stdout == ""


@pytest.mark.parametrize("page", PAGES[1:])
def test_figures_of_the_docs_are_those_of_the_results(page):
    """Every row of a table whose head stands in a report stands there too."""
    reports = "\n".join(path.read_text() for path in (FOLDER / "results").glob("*.md"))
    tables = re.findall(r"(?:^\|.*\n)+", text(page), re.MULTILINE)
    shown = [table for table in tables if table.splitlines()[0] in reports]
    least = {"docs/choosing.md": 2, "docs/padding_and_packing.md": 1, "docs/long_inputs.md": 3, "docs/training.md": 2}
    assert len(shown) >= least.get(page, 0)
    for row in "".join(shown).splitlines():
        assert row in reports


def test_figures_of_the_readme_are_those_of_the_results():
    """Every row of the README's tables of speed stands in a report under benchmarks/results."""
    reports = "\n".join(path.read_text() for path in (FOLDER / "results").glob("*.md"))
    readme = (FOLDER.parent / "README.md").read_text()
    section = readme[readme.index("## Speed") : readme.index("## Load and use")]
    rows = [line for line in section.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) >= 10
    for row in rows:
        assert row in reports
