"""The repository's own Python files, and what they import."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def tracked(*patterns: str) -> tuple[str, ...]:
    """Files under version control, by their paths from the root."""
    command = ["git", "ls-files", *patterns]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(name for name in shown.splitlines() if (ROOT / name).is_file())


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def module(file: str) -> str:
    """The name to import a file by: "lion_hf/data/masking.py" is lion_hf.data.masking."""
    return ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")


def imports(file: str) -> set[str]:
    """The absolute names of everything that a file imports, inside functions too.

    `from a import b` gives a and a.b, because b may be a module. Imports for type checkers count
    as well: they show which file knows of which.
    """
    package = Path(file).parent.parts
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found
