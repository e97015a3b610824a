"""What becomes of the figures of precision.py: a markdown table and a plot."""

from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TENSORS = ("query", "key", "value", "left_to_right", "right_to_left")


def table(report: dict) -> str:
    """The report in markdown: worst cases by form and type, by gates, and the models."""
    about, rows = report["about"], report["operation"]
    packages = [name for name in ("python", "torch", "transformers", "triton") if name in about]
    versions = ", ".join(f"{name} {about[name]}" for name in packages)
    lines = [f"{about['device']}, {about['date']}; {versions}", "", f"    {about['command']}", ""]
    lines += [f"{report['finite']}.", ""]
    lines += _table_by_form(rows) + _table_by_gates(rows)
    lines += ["", "### Whole models: error of the logits / of the gradient", ""]
    modes = dict.fromkeys(row["mode"] for row in report["models"])
    lines += ["| model | " + " | ".join(modes) + " |", "|---|" + "---:|" * len(modes)]
    models = {}
    for row in report["models"]:
        models.setdefault((row["modality"], row["family"]), []).append(row["errors"])
    for (modality, family), members in models.items():
        cells = [f"{errors['logits']:.1e} / {errors['gradient']:.1e}" for errors in members]
        lines.append(f"| {modality}, {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table_by_form(rows: list[dict]) -> list[str]:
    lines = ["### The operation: largest error, and in brackets the mean, over families and gates"]
    lines += ["", "| type | form | length | output | d query | d key | d value | d log-decays |"]
    lines += ["|---|---|---:|" + "---:|" * 5]
    groups = [(name,) for name in ("output", *TENSORS[:3])] + [TENSORS[3:]]
    members = {}
    for row in rows:
        key = row["dtype"], form_name(row), row["length"]
        members.setdefault(key, []).append(row["errors"])
    for (dtype, form, length), errors in members.items():
        cells = [worst([e[x] for e in errors for x in group if x in e]) for group in groups]
        lines.append(f"| {dtype} | {form} | {length:,} | {' | '.join(cells)} |")
    return lines


def _table_by_gates(rows: list[dict]) -> list[str]:
    lines = ["", "### The same by family and gates, over forms and lengths", ""]
    lines += ["| family | gates | what | " + " | ".join(DTYPES) + " |"]
    lines += ["|---|---|---|" + "---:|" * len(DTYPES)]
    groups = {"output": ("output",), "gradients": TENSORS[:3], "d log-decays": TENSORS[3:]}
    members = {}
    for row in rows:
        key = row["family"], row["gates"]
        members.setdefault(key, {}).setdefault(row["dtype"], []).append(row["errors"])
    for (family, gate), by_type in members.items():
        for what, group in groups.items():
            errors = [by_type.get(dtype, []) for dtype in DTYPES]
            cells = [worst([e[x] for e in found for x in group if x in e]) for found in errors]
            if set(cells) != {"–"}:
                lines.append(f"| {family} | {gate} | {what} | {' | '.join(cells)} |")
    return lines


def form_name(row: dict) -> str:
    return row["form"] + (" (triton)" if row["backend"] == "triton" else "")


def worst(errors: list[tuple[float, float]]) -> str:
    """The largest error of several tensors, and the largest of their means."""
    return f"{max(e[0] for e in errors):.1e} ({max(e[1] for e in errors):.0e})" if errors else "–"


def plot(path: Path, report: dict) -> None:
    """Draws the largest errors over length, a line per form and type.

    One panel is for the output and one for the gradients.
    """
    from matplotlib.figure import Figure  # here, not above: the figures do not need it

    rows, about = report["operation"], report["about"]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = {"output": ("output",), "gradients of query, key, value": TENSORS[:3]}
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items()):
        _draw_panel(axis, rows, names)
        axis.set_title(title, fontsize=10)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    title = f"{about['device']}, torch {about['torch']}: worst of all families and gates;"
    figure.suptitle(f"{title} thin lines: rounding of the result", fontsize=11)
    figure.savefig(path, dpi=110)


def _draw_panel(axis, rows: list[dict], names: tuple[str, ...]) -> None:
    """The largest errors of some tensors over the length, a line for each type and form."""
    forms = dict.fromkeys(form_name(r) for r in rows)
    for number, dtype in enumerate(DTYPES):
        color = f"C{number}"
        for form, style in zip(forms, ("o:", "s-", "^--", "x:", "d-", "v--")):
            members = [r for r in rows if (r["dtype"], form_name(r)) == (dtype, form)]
            errors = {}
            for r in members:
                if names[0] in r["errors"]:
                    found = [r["errors"][name][0] for name in names]
                    errors.setdefault(r["length"], []).extend(found)
            if errors:
                values, label = [max(e) for e in errors.values()], f"{dtype}, {form}"
                axis.plot(list(errors), values, style, label=label, color=color, markersize=5)
        rounding = torch.finfo(DTYPES[dtype]).eps / 2
        axis.axhline(rounding, color=color, linewidth=0.8, alpha=0.5)
    axis.set(xscale="log", yscale="log")
    axis.set(xlabel="tokens per row", ylabel="largest error over largest entry")
    lengths = sorted({r["length"] for r in rows})
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45, fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
