"""Writes docs/api.md from the docstrings: `python docs/make_api.py`.

A test says if the page is out of date.
"""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import lion_hf
from lion_hf.modeling.configuration_lion import CHOICES, MASK_TYPES, MODALITIES, family_defaults

PAGE = Path(__file__).with_name("api.md")
NO_DOCSTRING = {
    "AUTO_MODELS": "Auto class to LION class, by name: what `import lion_hf` registers.",
    "LionPreTrainedModel": "Base class of all models, a `PreTrainedModel` of transformers.",
}
HEAD = """# API

[Index](index.md). The public names of `lion_hf`. `help(lion_hf.lion_attention)` and so on give
shapes and errors.

<!-- Written by docs/make_api.py from the docstrings: edit those. -->"""
FIELDS = """
## Fields of LionConfig

It also has the fields of transformers' `PreTrainedConfig`. A field left at None takes the choice of
its family, and is saved resolved.

| field | default | what it is |
|---|---|---|"""
GROUPS = {
    "Models": lambda name: name.startswith("Lion") and name not in ("LionConfig", "LionTrainer"),
    "Configuration": lambda name: name == "LionConfig",
    "The operation": lambda name: (
        name in ("choose_form", "explain", "lion_attention", "snake_orders")
    ),
    "Export": lambda name: name == "portable_export",
    "Training": lambda name: name in ("DataCollatorForPackedLanguageModeling", "LionTrainer"),
    "Checkpoints and the Hub": lambda name: True,
}


def line(name: str) -> str:
    """A row of a table: name, arguments of a function, and the first line of its docstring."""
    thing, shown = getattr(lion_hf, name), name
    if inspect.isfunction(thing):
        shown += f"({', '.join(inspect.signature(thing).parameters)})"
    said = NO_DOCSTRING.get(name) or inspect.cleandoc(thing.__doc__).split("\n")[0]
    return f"| `{shown}` | {said} |"


def config_rows() -> list[str]:
    """Every field of LionConfig with its default and what the class's docstring says of it."""
    described = {}
    arguments = inspect.cleandoc(lion_hf.LionConfig.__doc__).split("Args:\n")[1]
    arguments = re.split(r"\n(?=\w+:\n)", arguments)[0]  # up to the next section
    for entry in re.split(r"\n    (?=\w+: )", "\n" + arguments)[1:]:
        name, _, said = entry.partition(": ")
        described[name] = " ".join(said.split())
    rows = []
    for field in fields(lion_hf.LionConfig):
        if field.name in described:
            default = f"`{field.default!r}`"
            rows.append(f"| `{field.name}` | {default} | {described.pop(field.name)} |")
    if described:
        raise ValueError(
            f"LionConfig's docstring describes {sorted(described)}, which are no fields"
        )
    return rows


def page() -> str:
    lines = [HEAD]
    left = list(lion_hf.__all__)
    for title, belongs in GROUPS.items():
        names = [name for name in left if belongs(name)]
        left = [name for name in left if name not in names]
        lines += ["", f"## {title}", "", "| name | what it is |", "|---|---|", *map(line, names)]
    lines += [FIELDS, *config_rows(), "", "### What None becomes", ""]
    families = [(modality, mask_type) for modality in MODALITIES for mask_type in MASK_TYPES]
    lines += [
        "| field | " + " | ".join(f"{m}, {t}" for m, t in families) + " |",
        "|---|" + "---|" * len(families),
    ]
    resolved = [family_defaults(*family) for family in families]
    lines += [
        f"| `{name}` | " + " | ".join(f"`{values[name]!r}`" for values in resolved) + " |"
        for name in resolved[0]
    ]
    lines += ["", "### Legal values", "", "| field | values |", "|---|---|"]
    lines += [
        f"| `{name}` | {', '.join(f'`{value!r}`' for value in values)} |"
        for name, values in CHOICES.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
