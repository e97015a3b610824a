"""Timing side by side, and peaks of memory.

The figures become JSON, a markdown table and a plot.
"""

import gc
import json
import os
import platform
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

PACKAGES = ("torch", "transformers", "onnxruntime", "triton", "flash-linear-attention")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6}  # relative to the largest entry
LEAST_SAMPLE = 0.02  # seconds: faster functions are called several times a sample


@dataclass
class Group:
    """Functions that do the same work, timed in turns.

    Args:
        suite: the table that the group belongs to.
        length: tokens per row.
        what: "forward", "forward + backward", ...; behind a comma the batch, which the plots leave
            out.
        functions: column of the table -> function without arguments.
        baseline: the column to which the others are compared; None for times alone.
        check: compares results before anything is timed; raises AssertionError where they differ,
            or takes a peer out.
        work: column -> bytes that must be moved and operations that must be done, as far as they
            are known.
        beside: column -> another one, to which it is compared too.
    """

    suite: str
    length: int
    what: str
    functions: dict[str, Callable[[], object]]
    baseline: str | None
    check: Callable[[], None]
    work: dict[str, tuple[float, float]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)


@dataclass
class Row:
    """What was measured of a group: milliseconds per call (median), or MiB.

    With it come ratios to the baseline (25 %, 50 %, 75 %).

    A ratio to another column than the baseline is named "column / other column".

    A share is the time that the machine's measured rates of copying or of matrix products allow,
    over the time taken.
    """

    suite: str
    length: int
    what: str
    baseline: str | None
    values: dict[str, float]
    ratios: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    repeats: int = 1


def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """The machine's speed of memory and of matrix products.

    Bytes per second (read and written) of a large copy, and operations per second of a large
    product.
    """
    elements = 2**28 if device == "cuda" else 2**26
    source, target = (torch.randn(elements, device=device).to(dtype) for _ in range(2))
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copying, product = (
        statistics.median(_time(function, 1, device) for _ in range(7))
        for function in (lambda: target.copy_(source), lambda: a @ b)
    )
    return 2 * elements * source.element_size() / copying, 2 * size**3 / product


def time_group(
    group: Group,
    device: str,
    seconds: float,
    progress: tqdm,
    limits: tuple[float, float] | None = None,
) -> Row:
    """Times the functions of a group in turns, for some seconds but at least three times each.

    A ratio is taken within every turn, so that a machine that becomes slower slows both. With
    `limits`, the `rates` of the machine, the row has shares of them.
    """
    progress.set_postfix_str("checking that the results agree")
    group.check()
    calls = {}
    for name, function in group.functions.items():
        progress.set_postfix_str(f"warming up {name}")
        duration = _time(function, 1, device)
        if duration < 1:
            duration = _time(function, 1, device)
        calls[name] = max(1, round(LEAST_SAMPLE / duration))
    samples: dict[str, list[float]] = {name: [] for name in group.functions}
    end, turns = time.perf_counter() + seconds, 0
    while turns < 3 or (turns < 200 and time.perf_counter() < end):
        progress.set_postfix_str(f"{group.length} tokens, {group.what}, turn {turns + 1}")
        for name, function in group.functions.items():
            samples[name].append(_time(function, calls[name], device))
        turns += 1
    row = Row(group.suite, group.length, group.what, group.baseline, {}, repeats=turns)
    compared = {name: (name, group.baseline) for name in samples if name != group.baseline}
    compared |= {f"{name} / {peer}": (name, peer) for name, peer in group.beside.items()}
    for column, (name, peer) in compared.items():
        if peer in samples:
            ratios = [a / b for a, b in zip(samples[name], samples[peer])]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row.ratios[column] = (low, middle, high)
    for name, times in samples.items():
        row.values[name] = statistics.median(times) * 1e3
        if limits is not None and name in group.work:
            row.shares[name] = max(
                n / rate for n, rate in zip(group.work[name], limits)
            ) / statistics.median(times)
    gc.collect()
    return row


def assert_close(
    found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str, largest: float = 0
) -> None:
    """Raises AssertionError if the largest error is too large.

    It may be `tolerance` times the largest entry, or times `largest`.
    """
    error = (found.double() - expected).abs().max().item()
    largest = max(expected.abs().max().item(), largest)
    if not error <= tolerance * largest:
        raise AssertionError(
            f"{what}: error {error:.2g} of entries up to {largest:.2g}; nothing was timed"
        )


def _time(function: Callable[[], object], calls: int, device: str) -> float:
    """Seconds a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def peak_memory(function: Callable[[], object], device: str) -> float:
    """MiB that a call needs above what is held before it.

    It runs on Linux, in a process of its own, or on a GPU.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the highest point starts anew
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**10


def in_turns(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of every call, one after the other in each turn, behind one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(1 + turns):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn > 0:
                times[name].append(time.process_time() - start)
    return times


def anonymous_peak(function: Callable[[], object]) -> float:
    """MiB of anonymous memory that a call needs above what is held before it, on Linux.

    Mapped files do not count. The memory is read every 20 ms.
    """
    before = most = _status("RssAnon")
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, _status("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        function()
    finally:
        ended.set()
        thread.join()
    return (most - before) / 2**10


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def read_log(log: Path) -> list[dict[str, Any]]:
    """The entries of a log with an object of JSON per line; none if there is no such file."""
    if not log.is_file():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def environment(device: str, dtype: str) -> dict[str, str]:
    """The machine, the versions and the command, as the reports carry them."""
    found = {"date": date.today().isoformat(), "command": f"python {shlex.join(sys.argv)}"}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    else:
        found["device"] = f"{_processor()}, {torch.get_num_threads()} threads"
    found |= {"dtype": dtype, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(folder: Path, name: str, about: dict[str, str], rows: list[Row], unit: str) -> None:
    """Writes NAME.json and NAME.md.

    It is called after every row, so that an interrupted run keeps what it has.
    """
    content = {"about": about, "unit": unit, "rows": [asdict(row) for row in rows]}
    written = folder / f".{name}.{os.getpid()}"
    for suffix, text in (
        (".json", json.dumps(content, indent=1)),
        (".md", table(about, rows, unit)),
    ):
        written.write_text(text + "\n", encoding="utf-8")
        written.replace(folder / f"{name}{suffix}")


def table(about: dict[str, str], rows: list[Row], unit: str) -> str:
    """A markdown table per suite.

    The baseline is in absolute units, the others are ratios to it with their quartiles.
    """
    lines = [
        f"{about['device']}, {about['dtype']}, {about['date']}; " + _versions(about),
        "",
        f"    {about['command']}",
    ]
    if "limits" in about:
        lines += [
            "",
            f"Percentages: of the speed that {about['limits']} allow (one chunk or chunks of 64,"
            " every tensor moved once).",
        ]
    for suite in dict.fromkeys(row.suite for row in rows):
        members = [row for row in rows if row.suite == suite]
        columns = list(dict.fromkeys([name for row in members for name in row.values]))
        columns += dict.fromkeys(
            name for row in members for name in row.ratios if name not in columns
        )
        baselines = {row.baseline for row in members if row.baseline}
        columns.sort(key=lambda name: name not in baselines)
        lines += ["", f"### {suite}", ""]
        heads = [f"{name} ({unit})" if name in baselines else name for name in columns]
        lines += [
            f"| length | what | {' | '.join(heads)} | turns |",
            "|---:|---|" + "---:|" * (len(columns) + 1),
        ]
        for row in members:
            cells = [_cell(row, name, unit) for name in columns]
            lines.append(f"| {row.length:,} | {row.what} | {' | '.join(cells)} | {row.repeats} |")
    return "\n".join(lines)


def _cell(row: Row, name: str, unit: str) -> str:
    share = f", {row.shares[name]:.0%}" if name in row.shares else ""
    if name in row.ratios:
        low, middle, high = row.ratios[name]
        return f"**{middle:.3g}** ({low:.3g}–{high:.3g}){share}"
    if name not in row.values:
        return "–"
    value = row.values[name]
    shown = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return shown + ("" if name == row.baseline else f" {unit}") + share


def _versions(about: dict[str, str]) -> str:
    return ", ".join(f"{name} {about[name]}" for name in ("python", *PACKAGES) if name in about)


def plot(path: Path, about: dict[str, str], rows: list[Row], unit: str) -> None:
    """Draws one panel per suite and kind of work, over length or as bars.

    It shows ratios to the baseline, or values where there is none.
    """
    from matplotlib.figure import Figure  # here, not above: the figures do not need it

    panels = list(dict.fromkeys((row.suite, row.what.split(",")[0]) for row in rows))
    columns = min(len(panels), 3)
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.8 * height + 0.4), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    for axis, (suite, what) in zip(axes, panels):
        members = [row for row in rows if (row.suite, row.what.split(",")[0]) == (suite, what)]
        baseline = next((row.baseline for row in members if row.baseline), None)
        names = list(
            dict.fromkeys(name for row in members for name in row.values if name != baseline)
        )
        draw = _draw_bars if len(members) == 1 else _draw_lines
        draw(axis, members, names, baseline, f"time over {baseline}" if baseline else unit)
        axis.set_title(f"{suite}: {what}")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.suptitle(
        f"{about['device']}, {about['dtype']}, torch {about.get('torch', '?')}", fontsize=11
    )
    figure.savefig(path, dpi=110)


def _points(row: Row, name: str, baseline: str | None) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of what is drawn."""
    return row.ratios[name] if baseline else (row.values[name],) * 3


def _draw_lines(axis, rows: list[Row], names: list[str], baseline: str | None, label: str) -> None:
    from matplotlib.ticker import LogLocator

    for number, name in enumerate(names):
        found = [row for row in rows if name in (row.ratios if baseline else row.values)]
        lengths = [row.length for row in found]
        low, middle, high = zip(*(_points(row, name, baseline) for row in found))
        axis.plot(
            lengths, middle, "o-", label=name, color=f"C{number}", linewidth=1.5, markersize=4
        )
        axis.fill_between(lengths, low, high, color=f"C{number}", alpha=0.2)
    if baseline:
        axis.axhline(1, color="black", linewidth=1, linestyle="--", label=baseline)
    axis.set(xscale="log", yscale="log", xlabel="tokens per row", ylabel=label)
    lengths = sorted({row.length for row in rows})
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45, fontsize=8)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.legend(fontsize=8)


def _draw_bars(axis, rows: list[Row], names: list[str], baseline: str | None, label: str) -> None:
    low, middle, high = zip(*(_points(rows[0], name, baseline) for name in names))
    errors = [[m - x for m, x in zip(middle, low)], [x - m for m, x in zip(middle, high)]]
    axis.barh(
        names, middle, xerr=errors, color=[f"C{number}" for number in range(len(names))], height=0.6
    )
    axis.invert_yaxis()
    axis.set_xlabel(f"{label}, {rows[0].length:,} tokens per row")
    if baseline:
        axis.axvline(1, color="black", linewidth=1, linestyle="--")
