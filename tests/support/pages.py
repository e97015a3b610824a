"""The pages for readers, and the code on them."""

import re
import shlex
from pathlib import Path

TRAINING = ("mlm", "glue", "images")  # the commands that train
ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))),
)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and code of every fenced block that has a language."""
    return re.findall(r"```(\w+)\n(.*?)```", text(page), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of every command in the page's blocks of bash."""
    lines = [
        block.replace("\\\n", " ").splitlines()
        for language, block in blocks(page)
        if language == "bash"
    ]
    return [words for line in sum(lines, []) if (words := shlex.split(line, comments=True))]


def task_of(command: list[str]) -> tuple[str, list[str]] | None:
    """The task and the arguments of a training command, whichever way it is started."""
    for place, word in enumerate(command[:-1]):
        if word in ("lion-hf", "lion_hf") and command[place + 1] in TRAINING:
            return command[place + 1], command[place + 2 :]
    return None
