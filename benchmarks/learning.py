"""What the same budget teaches LION, BERT, ModernBERT and softmax attention in LION's own block.

    python benchmarks/learning.py run --data DATA     # everything, for hours; skips what is done
    python benchmarks/learning.py run --data DATA --tasks mlm-128 --arms "modern LION-S" ModernBERT
    python benchmarks/learning.py run --data DATA --quick --output OUT     # in minutes, a few steps
    python benchmarks/learning.py run --data DATA --tasks chapters --steps 1100    # longer runs
    python benchmarks/learning.py time --data DATA    # seconds per step, of all models in turns
    python benchmarks/learning.py report

DATA holds a folder for each kind of data: `speeches` with `train.txt` and `validation.txt`, a
paragraph per line; `sentiment` and `pairs` with `train.csv` and `validation.csv`; `chapters` with
`documents.jsonl`; `fashion_mnist` with `train` and `test`, by class. Every run is a line of
`learning.jsonl` in the output folder, so the command goes on where it was stopped. For each arm the
learning rate is chosen on the tuning seed 0. The other seeds are paired: all arms see the same
rows, in the same order, with the same masks. Tasks that start from pretrained weights take those of
the same seed. `--steps` makes longer runs, at the learning rate of the usual ones: in the time of a
slower model, a faster one may take more steps. `time` measures the steps of all arms beside each
other, because runs of different days do not compare them. `report` writes `learning.md` and the
curves.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from learning_arms import ARMS, IMAGE_ARMS, arms_of, build
from learning_report import TUNING_SEED, report
from learning_tasks import TASKS, Data, Task, load
from measure import in_turns, read_log
from safetensors.torch import save_model
from torch import nn
from tqdm import tqdm

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
WARMUP = 0.06
WEIGHT_DECAY = 0.01
CURVE_POINTS = 5  # validations of a run
VALIDATION_ROWS, QUICK_ROWS = 512, 16
TIMES = "learning_times.jsonl"
RESULTS = Path(__file__).with_name("results")


def train(
    model: nn.Module, task: Task, data: Data, rate: float, seed: int, rows: int
) -> dict[str, Any]:
    """One run; returns what it reached, its curve, and the seconds that its steps took.

    The curve has steps, CPU seconds of all threads, and what was measured.
    """
    optimizer = optimizer_of(model, rate)
    warmup = max(1, round(WARMUP * task.steps))
    batches, seconds, cpu_seconds = data.batches(task.batch, seed), 0.0, 0.0
    curve: list[tuple[int, float, dict[str, float]]] = []
    for step in tqdm(range(task.steps), desc=f"{rate:g}, seed {seed}", disable=None):
        progress = max(0, step - warmup) / max(1, task.steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = (
                rate * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
            )
        batch, start, cpu_start = next(batches), time.perf_counter(), time.process_time()
        loss = take_step(model, optimizer, batch)
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
        if (step + 1) % max(1, task.steps // CURVE_POINTS) == 0 or not loss.isfinite():
            curve.append((step + 1, round(cpu_seconds, 2), data.measure(model.eval(), rows)))
        if not loss.isfinite():
            break
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "threads": torch.get_num_threads(),
        "curve": curve,
        **curve[-1][2],
    }


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay on vectors."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.dim() >= 2],
            "weight_decay": WEIGHT_DECAY,
        },
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """One step of training; returns the loss."""
    loss = model.train()(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def steps_on(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> Callable[[], object]:
    """What takes a step on the next of these batches whenever it is called."""
    optimizer, left = optimizer_of(model, RATES[0]), iter(batches)
    return lambda: take_step(model, optimizer, next(left))


def time_steps(args: argparse.Namespace) -> None:
    """Notes the median CPU seconds of a step of every arm, all arms in turns."""
    for name in args.tasks:
        task = TASKS[name]
        data = load(task, args.data, args.output)
        arms = [arm for arm in arms_of(task) if arm in args.arms]
        models = {arm: build(arm, task.kind, task.length, data.classes, None) for arm in arms}
        batches = list(islice(data.batches(task.batch, TUNING_SEED), 1 + args.turns))
        steps = {arm: steps_on(model, batches) for arm, model in models.items()}
        with (args.output / TIMES).open("a", encoding="utf-8") as file:
            for arm, seconds in in_turns(steps, args.turns).items():
                median = statistics.median(seconds)
                entry = {"task": name, "arm": arm, "step_seconds": median, "turns": args.turns}
                file.write(json.dumps(entry) + "\n")
                print(f"{name}, {arm}: {1000 * median:.0f} ms", flush=True)


def run(args: argparse.Namespace) -> None:
    """Does every run of the tasks, arms and seeds that is not done yet."""
    (args.output / "weights").mkdir(parents=True, exist_ok=True)
    for name in TASKS:  # in this order: later tasks start from earlier ones' weights
        if name not in args.tasks:
            continue
        task = _task(name, args.quick)
        data = load(task, args.data, args.output)
        for arm in arms_of(task):
            if arm in args.arms:
                run_arm(args, name, arm, task, data)


def _task(name: str, quick: bool) -> Task:
    """A task, or a small version of it that shows that it runs."""
    task = TASKS[name]
    if not quick:
        return task
    small = {"batch": 4, "length": min(task.length, 64), "steps": 3, "pairs": min(task.pairs, 4)}
    return dataclasses.replace(task, **small)


def run_arm(args: argparse.Namespace, name: str, arm: str, task: Task, data: Data) -> None:
    """What is still to do of an arm on a task."""
    log = args.output / "learning.jsonl"
    plan = _plan(args, name, arm, task.steps, log)
    task = dataclasses.replace(task, steps=args.steps or task.steps)
    for rate, seed in plan:
        torch.manual_seed(seed)
        source = None
        if task.source is not None:  # the tuning seed takes the first paired seed's weights
            source = _weights(args, task.source, arm, seed if seed in args.seeds else args.seeds[0])
            if not source.is_file():
                raise FileNotFoundError(
                    f"{name} starts from the weights of {task.source}, and there is no {source}:"
                    f" run --tasks {task.source} first"
                )
        model = build(arm, task.kind, task.length, data.classes, source)
        rows = QUICK_ROWS if args.quick else VALIDATION_ROWS
        result = train(model, task, data, rate, seed, rows)
        if task.kind == "text" and seed != TUNING_SEED and args.steps is None:
            save_model(model, str(_weights(args, name, arm, seed)))
        entry = {"task": name, "arm": arm, "rate": rate, "seed": seed, "steps": task.steps}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | result) + "\n")
        print(f"{name}, {arm}, {rate:g}, seed {seed}: loss {result['loss']:.3f}", flush=True)


def _weights(args: argparse.Namespace, task: str, arm: str, seed: int) -> Path:
    return args.output / "weights" / f"{task} {arm} {seed}.safetensors"


def _plan(
    args: argparse.Namespace, task: str, arm: str, usual: int, log: Path
) -> Iterator[tuple[float, int]]:
    """What is still to do: the rates on the tuning seed, then the best one on the other seeds.

    Longer runs have the rate that was best with the usual number of steps.
    """

    def done(seed: int, steps: int) -> dict[float, float]:
        run = {"task": task, "arm": arm, "seed": seed, "steps": steps}
        return {e["rate"]: e["loss"] for e in read_log(log) if run.items() <= e.items()}

    for rate in args.rates if args.steps is None else ():
        if rate not in done(TUNING_SEED, usual):
            yield rate, TUNING_SEED
    tried = done(TUNING_SEED, usual)
    if not tried:
        raise FileNotFoundError(
            f"--steps {args.steps}: {arm} has no runs of {usual} steps of {task} yet, which choose"
            " the learning rate: run it without --steps first"
        )
    best = min(tried, key=lambda rate: tried[rate])
    for seed in args.seeds:
        if best not in done(seed, args.steps or usual):
            yield best, seed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "time", "report"))
    parser.add_argument("--data", type=Path, help="folder with speeches/ and the others")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of log, table, curves and weights"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arms = list(dict.fromkeys([*ARMS, *IMAGE_ARMS]))
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=list(RATES),
        help="learning rates to try on the tuning seed",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds of the best rate"
    )
    parser.add_argument(
        "--steps", type=int, help="steps of longer runs, at the rate of the usual ones"
    )
    parser.add_argument(
        "--turns", type=int, default=20, help="steps of each model that `time` measures"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of each, to see that everything runs"
    )
    args = parser.parse_args(argv)
    if args.command == "report":
        report(read_log(args.output / "learning.jsonl"), read_log(args.output / TIMES), args.output)
        return
    if args.data is None or not (args.data / "speeches" / "train.txt").is_file():
        parser.error(f"--data {args.data}: expected a folder with speeches/train.txt")
    for name in args.tasks if args.steps is not None else ():
        if args.steps <= (usual := _task(name, args.quick).steps):
            parser.error(f"--steps {args.steps}: expected more than the {usual} of {name}")
    try:
        (run if args.command == "run" else time_steps)(args)
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
