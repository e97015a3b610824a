"""All that a machine with a GPU should be asked, in order of value; `benchmarks/run.py gpu`.

Every step is a command of its own, so that one that fails or hangs costs its own figures only. What
is done is a line of `gpu.jsonl` in the output folder, with date, device, versions and command, and
is not done again: the same command goes on after a stop. A step that failed is tried again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import read_log

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
KERNEL_TESTS = (
    "tests/modeling/test_triton.py",
    "tests/modeling/test_equivalence.py",
    "tests/modeling/test_models_on_kernels.py",
)


@dataclass(frozen=True)
class Step:
    """A command, and the most minutes that it may take."""

    name: str
    command: tuple[str, ...]
    minutes: float


def steps(output: Path) -> list[Step]:
    """What is to be done, the most valuable first; reports go to the output folder."""
    bench = (PYTHON, "benchmarks/run.py")
    gpu = ("--device", "cuda", "--output", str(output))
    tests = (PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-n", "8", *KERNEL_TESTS)
    return [
        Step("kernels are right", tests, 7),
        Step("blocks", (*bench, "blocks", *gpu), 5),
        Step("operation", (*bench, "op", *gpu), 5),
        Step("training steps", (*bench, "train", *gpu), 4),
        Step("models", (*bench, "model", *gpu), 4),
        Step("precision", (PYTHON, "benchmarks/precision.py", "--device", "cuda"), 4),
        Step("training memory", (*bench, "training-memory", *gpu), 3),
        Step("memory", (*bench, "memory", *gpu), 3),
        Step("forms and chunk sizes", (*bench, "chunks", *gpu), 4),
    ]


def run(todo: Sequence[Step], output: Path, minutes: float, about: Mapping[str, str]) -> list[str]:
    """Does the steps that are not done yet, as long as there is time.

    Args:
        todo: in order.
        output: folder of the log.
        minutes: no step goes on for longer than that after the start.
        about: the machine and the versions, for the log.

    Returns:
        The names of the steps that failed, or for which there was no time.
    """
    log, end = output / "gpu.jsonl", time.monotonic() + 60 * minutes
    missing = []
    for step in todo:
        if step.name in finished(log):
            print(f"{step.name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < 1:
            print(f"{step.name}: no time left", flush=True)
            missing.append(step.name)
            continue
        print(f"{step.name}: {' '.join(step.command)}", flush=True)
        start = time.monotonic()
        try:
            limit = min(left, 60 * step.minutes)
            code: int | str = subprocess.run(step.command, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired as error:
            code = f"stopped after {error.timeout:.0f} s"
        if code != 0:
            missing.append(step.name)
        entry = {
            "step": step.name,
            "result": code,
            "seconds": round(time.monotonic() - start, 1),
            "command": list(step.command[1:]),
        }
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | {"environment": dict(about)}) + "\n")
    return missing


def finished(log: Path) -> set[str]:
    """Names of the steps that ended well."""
    return {entry["step"] for entry in read_log(log) if entry["result"] == 0}
