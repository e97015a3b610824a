"""The code of the pages runs as a reader would run it, and what they refer to is there."""

import re
from pathlib import Path

import pytest
from support.models import text_config
from support.pages import PAGES, ROOT, blocks, commands, task_of, text
from transformers import BertTokenizer

from lion_hf import LionForMaskedLM, cli

README = "README.md"
README_LINES = 220
KNOWN_TOOLS = ("git", "ruff", "pre-commit")  # of CONTRIBUTING.md
# What the code may read, as beside the README.
VISIBLE = ("README.md", "benchmarks", "configs", "run_scripts", "tests")


def save_like_the_demo(folder: Path) -> None:
    """The masked language model that the README's code loads, which the demo would have saved."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "secretary", "reports"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    LionForMaskedLM(text_config(vocab_size=len(words))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code(page, tmp_path, monkeypatch):
    """A page's Python blocks run in one namespace, with the conversions between them.

    They run in an empty folder beside the sources.
    """
    for name in VISIBLE:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    if page == README:
        save_like_the_demo(tmp_path / "outputs" / "demo" / "speeches")
    namespace, ran = {}, 0
    for language, block in blocks(page):
        if language == "python":
            # Blank lines above, so that errors name the page's own lines.
            above = text(page)[: text(page).index(block)].count("\n")
            exec(compile("\n" * above + block, page, "exec"), namespace)
            ran += 1
        elif language == "bash" and block.startswith("lion-hf convert"):
            for line in block.replace("\\\n", " ").splitlines():
                assert cli.main(line.split()[1:]) == 0
    assert ran == sum(language == "python" for language, _ in blocks(page))
    if page == README:
        assert ran == 2 and namespace["logits"].shape[-1] == 9
    if page == "docs/using.md":
        assert ran >= 6 and namespace["logits"].shape == (1, 1000)
        assert len(namespace["answers"]) == 4


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_run_or_understood(page):
    """Training commands run in test_readme_commands.py, conversions above; the rest only parse."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for command in commands(page):
        for path in re.findall(
            r"(?:run_scripts|tests|configs|benchmarks)/[\w./-]+", " ".join(command)
        ):
            assert (ROOT / path).exists(), path
        script = next((ROOT / word for word in command if word.endswith(".py")), None)
        if task_of(command):
            continue
        if "install" in command:
            extras = re.findall(r"\[([\w,]+)\]", " ".join(command))
            assert all(
                f"\n{extra} = [" in project for names in extras for extra in names.split(",")
            ), command
        elif command[:2] == ["lion-hf", "linearize"]:
            cli._linearize_settings(command[2:])
        elif command[0] == "lion-hf":
            cli._parser().parse_args(command[1:])
        elif script is not None and script.parent.name == "benchmarks":
            options = [word for word in command if word.startswith("--")]
            assert not [word for word in options if f'"{word}"' not in script.read_text()], command
        else:
            assert command[:3] == ["python", "-m", "pytest"] or command[0] in KNOWN_TOOLS, command


def test_the_readme_is_short():
    assert text(README).count("\n") <= README_LINES


def test_the_readme_installs():
    shown = " ".join(" ".join(command) for command in commands(README))
    assert ".[demo]" in shown and ".[test]" in shown


@pytest.mark.parametrize("page", PAGES)
def test_languages(page):
    """A block of another kind would not be looked at."""
    assert {language for language, _ in blocks(page)} <= {"python", "bash"}
    assert text(page).count("```") == 2 * len(blocks(page)), "a block without a language"


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Files and headings that links lead to exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings
            }, target


def test_every_page_is_in_the_index():
    assert {Path(page).name for page in PAGES if page.startswith("docs/")} - {"index.md"} <= set(
        re.findall(r"\]\((\w+\.md)\)", text("docs/index.md"))
    )


def test_ci_runs_the_command_of_the_readme():
    """What .ci/run takes out of the README is the one line that installs and tests."""
    (pattern,) = re.findall(r"grep -m 1 -F '(.+)' README.md", (ROOT / ".ci/run").read_text())
    line = next(line for line in text(README).splitlines() if pattern in line)
    assert line.startswith("python -m venv") and line.endswith("-m pytest -n 2")


REPORTS = ("training", "linearize", "learning")


@pytest.mark.parametrize(
    ("page", "heading", "least"),
    [
        (README, "## What it learns", 8),
        ("docs/training.md", "## Results", 11),
        ("docs/linearize.md", "## Results", 4),
    ],
)
def test_results_stand_in_the_reports(page, heading, least):
    shown = text(page).split(f"\n{heading}\n")[1].split("\n## ")[0]
    reports = [ROOT / f"benchmarks/results/{name}.md" for name in REPORTS]
    report = [line for path in reports for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(rows) >= least and not [row for row in rows if row not in report]
