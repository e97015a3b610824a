"""The suite "blocks" of run.py: the fused kernels of a GPU, cut in other ways.

For every kernel of `lion_triton_launch.BLOCKS`, type, head size and length it times the launches of
this kernel alone, in a forward and a backward pass of LION-S with a divisor, for the table's row
and for those one step away from it. Refused are candidates that do not compile, that need more
shared memory than there is, or whose results differ from those of the table's row. Which is the
fastest over the lengths is printed as the table has it, to be typed in there. Several reading
orders are not timed.

Leaves blocks-cuda.json and .md.
"""

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from measure import TOLERANCE, Group, assert_close, environment, time_group
from torch.nn import functional as F
from tqdm import tqdm

from lion_hf.modeling import lion_triton
from lion_hf.modeling.lion_choice import default_chunk_size
from lion_hf.modeling.lion_triton_launch import (
    BLOCKS,
    KERNELS,
    LARGEST_HEAD,
    Blocks,
    blocks_of,
)

LENGTHS, HEAD_SIZES, DTYPES = (197, 4096), (64, 128), (torch.bfloat16, torch.float32)
WIDTH = 768  # of all heads together
TOKENS = 65_536  # a batch: so many that the kernel takes longer than asking for it


class Case(NamedTuple):
    kernel: str
    dtype: torch.dtype
    head: int
    length: int
    heads: int


class Launches:
    """Stands in a kernel's place and keeps its launches, to be repeated."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid) -> Callable:
        def launch(*args, **options):
            self.calls.append(partial(self.kernel[grid], *args, **options))
            self.calls[-1]()

        return launch


def tune(args: argparse.Namespace) -> None:
    """Runs the suite; with `args.quick` two candidates, one head and one row."""
    cases = [
        Case(kernel, dtype, head, length, 1 if args.quick else WIDTH // head)
        for kernel in BLOCKS
        for dtype in DTYPES
        for head in (HEAD_SIZES[:1] if args.quick else HEAD_SIZES)
        for length in args.lengths or LENGTHS
    ]
    # one chunk writes no states
    cases = [x for x in cases if x.kernel != "write_states" or x.length > _chunk_size(x.length)]
    few, device = args.quick, args.device
    jobs = [(case, row, device) for case in cases for row in candidates(table_row(case), few)]
    # Compiled side by side; triton's cache on the disk keeps them for what follows.
    processes = 1 if few else min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        refused = list(tqdm(pool.imap(refusal, jobs), total=len(jobs), desc="candidates"))

    report = []
    with tqdm(cases, desc="blocks", unit="kernel") as progress:
        for case in progress:
            found = {row: why for (other, row, _), why in zip(jobs, refused) if other == case}
            report.append(_time_case(case, found, args, progress))
    about = environment(device, "bfloat16 and float32")
    text, figures = table(about, cases, report), {"about": about, "rows": report}
    (args.output / f"blocks-{device}.json").write_text(json.dumps(figures, indent=1) + "\n")
    (args.output / f"blocks-{device}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _time_case(
    case: Case, refused: dict[Blocks, str | None], args: argparse.Namespace, progress: tqdm
) -> dict:
    """A row of the report: times of the candidates, and why the others were refused."""
    batch = 1 if args.quick else max(1, TOKENS // case.length)
    inputs, functions = inputs_of(case, batch, args.device), {}
    for row, why in refused.items():
        if why is None:
            functions[str(tuple(row))] = partial(_call_all, both_passes(case, row, inputs)[1])
    what = f"{case.kernel} of {case.dtype}"
    group = Group(case.kernel, case.length, what, functions, None, lambda: None)
    times = time_group(group, args.device, args.seconds / 3, progress).values
    reasons = {str(tuple(row)): why for row, why in refused.items() if why}
    figures = {"dtype": str(case.dtype), "milliseconds": times, "refused": reasons}
    return {**case._asdict(), **figures}


def _chunk_size(length: int) -> int:
    return default_chunk_size(length, "cuda")[0]


def table_row(case: Case) -> Blocks:
    return blocks_of(case.kernel, case.dtype.itemsize, case.head)


def candidates(row: Blocks, few: bool) -> list[Blocks]:
    """The table's row, and rows that differ from it in one size or in the stages.

    The size is half or double; with rows or columns, the warps may follow.
    """
    found = [row]
    for names in (
        ("rows",),
        ("columns",),
        ("slices",),
        ("warps",),
        ("rows", "warps"),
        ("columns", "warps"),
    ):
        for factor in (0.5, 2):
            found.append(row._replace(**{name: int(getattr(row, name) * factor) for name in names}))
    found += [row._replace(stages=stages) for stages in (1, 2, 3) if stages != row.stages]
    found = [x for x in found if min(x[:3]) >= 16 and max(x[:3]) <= 128 and 4 <= x.warps <= 8]
    return found[:2] if few else found


def inputs_of(case: Case, batch: int, device: str) -> list[torch.Tensor]:
    """The output's gradient, query, key, value, and the log-decays of both directions."""
    torch.manual_seed(0)
    shape = (batch, case.length, case.heads, case.head)  # the layout that projections leave
    four = (torch.rand(shape, device=device).to(case.dtype).transpose(1, 2) for _ in range(4))
    gates = (
        F.logsigmoid(torch.randn(1, batch, case.heads, case.length, device=device) + 3)
        for _ in range(2)
    )
    return [*four, *gates]


def both_passes(
    case: Case, row: Blocks, inputs: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[Callable]]:
    """Outputs and gradients with one kernel cut as `row` says, and this kernel's launches."""
    grad, *inputs = (*inputs, None, None, None)  # no orders, no padding, no dropout
    launches = Launches(KERNELS[case.kernel])
    blocks = {(case.dtype.itemsize, LARGEST_HEAD): row}
    with (
        mock.patch.dict(BLOCKS, {case.kernel: blocks}),
        mock.patch.dict(KERNELS, {case.kernel: launches}),
    ):
        output, divisor = lion_triton.fused_forward(*inputs, 0.0, 1.0, True, 1e-6, None, case.dtype)
        grads = lion_triton.fused_backward(grad, *inputs, output, divisor, 0.0, 1.0, True, None)
    return [output, *grads], launches.calls


def refusal(job: tuple) -> str | None:
    """Why a candidate is refused, or None.

    Its results are judged by those of the table's row.
    """
    case, row, device = job
    try:
        inputs = inputs_of(case, 1, device)
        found, expected = (both_passes(case, x, inputs)[0] for x in (row, table_row(case)))
        for x, y in zip(found, expected):
            assert_close(x, y.double(), TOLERANCE[case.dtype], "beside the table's row")
    except Exception as error:  # triton's compiler has many kinds
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return None


def _call_all(launches: list[Callable]) -> None:
    for launch in launches:
        launch()


def table(about: dict[str, str], cases: list[Case], report: list[dict]) -> str:
    """The figures of every case, and the fastest candidate for every row of `BLOCKS`.

    That is the fastest over the lengths.
    """
    lines = [
        f"{about['device']}, {about['date']}; torch {about['torch']}, triton {about['triton']}",
        "",
    ]
    lines += [
        f"    {about['command']}",
        "",
        "Rows, columns, slices, warps, stages; in bold the time over the table's.",
        "",
    ]
    lines.append(
        "| kernel | type | head | length | the table's, ms | others, the fastest first | refused |"
    )
    lines.append("|---|---|---:|---:|---|---|---|")
    ratios = {}  # (kernel, type, head) -> candidate -> one ratio a length
    for case, found in zip(cases, report):
        # there is no time for the table's row if it is itself refused
        own, times = str(tuple(table_row(case))), found["milliseconds"]
        over = {
            name: time / times[own]
            for name, time in sorted(times.items(), key=lambda item: item[1])
        }
        for name, ratio in over.items():
            ratios.setdefault(case[:3], {}).setdefault(name, []).append(ratio)
        shown = ", ".join(f"{name} **{ratio:.3g}**" for name, ratio in over.items() if name != own)
        line = f"| {case.kernel} | {case.dtype} | {case.head} | {case.length:,} | {own}"
        line += f" {times.get(own, math.nan):.4g} "
        lines.append(f"{line}| {shown or '–'} | {', '.join(found['refused']) or '–'} |")
    lines += ["", "What `BLOCKS` would have, with the product of the ratios of all lengths:", ""]
    for (kernel, dtype, head), members in ratios.items():
        most = max(map(len, members.values()))  # a candidate that some length refuses serves none
        best = min(
            (name for name in members if len(members[name]) == most),
            key=lambda name: math.prod(members[name]),
        )
        lines.append(
            f"    {kernel}: ({dtype.itemsize}, {head}): Blocks{best},"
            f"  # {math.prod(members[best]):.3g}"
        )
    return "\n".join(lines)
