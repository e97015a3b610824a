"""What the same budget teaches LION, BERT, ModernBERT and softmax attention in LION's own block.

    python benchmarks/learning.py run --data DATA     # everything, for hours; skips what is done
    python benchmarks/learning.py run --data DATA --tasks mlm-128 --arms "modern LION-S" ModernBERT
    python benchmarks/learning.py run --data DATA --quick --output OUT     # in minutes, a few steps
    python benchmarks/learning.py report

DATA holds `train.txt` and `validation.txt`, a paragraph per line. Every run is a line of
`learning.jsonl` in the output folder, so the command goes on where it was stopped. For each arm the
learning rate is chosen on the tuning seed 0. The other seeds are paired: all arms see the same
rows, in the same order, with the same masks. `report` writes `learning.md` and the curves.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from learning_arms import ARMS
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BertTokenizer, BertTokenizerFast, PreTrainedModel

VOCABULARY = 8192
TUNING_SEED = 0
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
MASKING, VALIDATION_MASKING = 0.3, 0.15
WARMUP = 0.06
WEIGHT_DECAY = 0.01
CURVE_POINTS = 5  # validations of a run
RESULTS = Path(__file__).with_name("results")
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776}  # 97.5 % quantile of Student's t, by degrees of freedom


@dataclass(frozen=True)
class Task:
    """What is learnt: rows of text to be filled in, or pairs to be recalled.

    Args:
        batch: rows per step.
        length: tokens per row.
        steps: steps of a run.
        pairs: key-value pairs per row of associative recall; 0 for masked language modelling.
    """

    batch: int
    length: int
    steps: int
    pairs: int = 0


TASKS = {
    "mlm-128": Task(batch=16, length=128, steps=1200),
    "mlm-512": Task(batch=4, length=512, steps=600),
    "recall-64": Task(batch=64, length=64, steps=1500, pairs=4),
    "recall-512": Task(batch=16, length=512, steps=1500, pairs=64),
}


class Text:
    """Text as rows of one length, paragraph after paragraph, masked by seed and step."""

    def __init__(self, folder: Path, cache: Path, length: int):
        tokenizer = _tokenizer(folder, cache)
        self.mask, self.words = tokenizer.mask_token_id, len(tokenizer)
        self.special = len(tokenizer.all_special_tokens)
        self.rows = {
            part: _rows(tokenizer, folder / f"{part}.txt", length)
            for part in ("train", "validation")
        }

    def batches(self, batch: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Training batches without end."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.rows["train"]
        while True:
            for chosen in torch.randperm(len(rows), generator=generator).split(batch):
                if len(chosen) == batch:
                    yield self.masked(rows[chosen], MASKING, generator)

    def masked(
        self, rows: torch.Tensor, share: float, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Rows of which a share of the tokens is to be predicted.

        80 % of these are hidden, and 10 % are replaced by random words.
        """
        chosen = torch.rand(rows.shape, generator=generator) < share
        how = torch.rand(rows.shape, generator=generator)
        words = torch.randint(self.special, self.words, rows.shape, generator=generator)
        ids = torch.where(
            chosen & (how < 0.8), self.mask, torch.where(chosen & (how > 0.9), words, rows)
        )
        return {"input_ids": ids, "labels": torch.where(chosen, rows, -100)}

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, rows: int) -> dict[str, float]:
        """Loss in nats and accuracy over the masked tokens of validation rows."""
        generator, sums = torch.Generator().manual_seed(1234), torch.zeros(3)
        for piece in self.rows["validation"][:rows].split(16):
            batch = self.masked(piece, VALIDATION_MASKING, generator)
            labels = batch["labels"][batch["labels"] != -100]
            logits = _logits(model, batch)
            right = (logits.argmax(-1) == labels).sum()
            sums += torch.tensor(
                [F.cross_entropy(logits, labels, reduction="sum"), right, len(labels)]
            )
        return {"loss": (sums[0] / sums[2]).item(), "accuracy": (sums[1] / sums[2]).item()}


class Recall:
    """Associative recall: pairs of a key and a value, then keys whose values are to be named.

    This is MQAR (arXiv 2312.04927). Keys and values have halves of the vocabulary of their own, and
    no key occurs in two pairs of a row. Queries are at random places of the rest of the row.
    """

    def __init__(self, pairs: int, length: int):
        self.pairs, self.length = pairs, length

    def batches(self, batch: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Training batches without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.make(batch, generator)

    def make(self, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A batch: labels stand at the queries."""
        half = VOCABULARY // 2
        keys = torch.rand(batch, half, generator=generator).argsort(1)[:, : self.pairs] + 1
        values = torch.randint(half + 1, VOCABULARY, (batch, self.pairs), generator=generator)
        ids = torch.zeros(batch, self.length, dtype=torch.long)
        labels = torch.full((batch, self.length), -100)
        ids[:, 0 : 2 * self.pairs : 2], ids[:, 1 : 2 * self.pairs : 2] = keys, values
        room = self.length - 2 * self.pairs
        places = (
            torch.rand(batch, room, generator=generator).argsort(1)[:, : self.pairs]
            + 2 * self.pairs
        )
        ids.scatter_(1, places, keys)
        labels.scatter_(1, places, values)
        return {"input_ids": ids, "labels": labels}

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, rows: int) -> dict[str, float]:
        """Loss in nats and accuracy over queries of fresh rows."""
        batch = self.make(rows, torch.Generator().manual_seed(1234))
        labels = batch["labels"][batch["labels"] != -100]
        logits = torch.cat(
            [
                _logits(model, {k: v[n : n + 16] for k, v in batch.items()})
                for n in range(0, rows, 16)
            ]
        )
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}


def _logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the labelled tokens, whether or not the model computes the others."""
    logits = model(**batch).logits
    return logits if logits.dim() == 2 else logits[batch["labels"] != -100]


def _tokenizer(folder: Path, cache: Path) -> BertTokenizerFast:
    place = cache / "tokenizer"
    if not (place / "tokenizer.json").is_file():
        with (folder / "train.txt").open(encoding="utf-8") as text:
            tokenizer = BertTokenizer().train_new_from_iterator(
                text, vocab_size=VOCABULARY, show_progress=False
            )
        tokenizer.save_pretrained(place)
    return BertTokenizerFast.from_pretrained(place)


def _rows(tokenizer: BertTokenizerFast, file: Path, length: int) -> torch.Tensor:
    with file.open(encoding="utf-8") as text:
        lines = [line for line in text if not line.isspace()]
    documents = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(
        [token for document in documents for token in (*document, tokenizer.sep_token_id)]
    )
    return ids[: len(ids) // length * length].view(-1, length)


def train(
    arm: str, task: Task, data: Text | Recall, rate: float, seed: int, validation_rows: int
) -> dict[str, Any]:
    """One run; returns what it reached, its curve, and the seconds that its steps took."""
    torch.manual_seed(seed)
    model = ARMS[arm](VOCABULARY, task.length)
    exempt = [p for p in model.parameters() if p.dim() < 2]
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": exempt, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warmup = max(1, round(WARMUP * task.steps))
    batches, seconds, curve = data.batches(task.batch, seed), 0.0, []
    for step in tqdm(range(task.steps), desc=f"{arm}, {rate:g}, seed {seed}", disable=None):
        progress = max(0, step - warmup) / max(1, task.steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = (
                rate * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
            )
        batch, start = next(batches), time.perf_counter()
        loss = model.train()(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - start
        if (step + 1) % max(1, task.steps // CURVE_POINTS) == 0 or not loss.isfinite():
            curve.append((step + 1, round(seconds, 2), data.measure(model.eval(), validation_rows)))
        if not loss.isfinite():
            break
    return {
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "curve": curve,
        **curve[-1][2],
    }


def run(args: argparse.Namespace) -> None:
    """Does every run of the tasks, arms and seeds that is not done yet."""
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "learning.jsonl"
    for name in args.tasks:
        task = TASKS[name]
        if args.quick:
            task = Task(4, min(task.length, 64), 6, min(task.pairs, 4))
        data = (
            Recall(task.pairs, task.length)
            if task.pairs
            else Text(args.data, args.output, task.length)
        )
        for arm in args.arms:
            for rate, seed in _plan(args, name, arm, log):
                result = train(arm, task, data, rate, seed, 16 if args.quick else 512)
                entry = {
                    "task": name,
                    "arm": arm,
                    "rate": rate,
                    "seed": seed,
                    "steps": task.steps,
                    **result,
                }
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                print(
                    f"{name}, {arm}, {rate:g}, seed {seed}: loss {result['loss']:.3f}", flush=True
                )


def _plan(args: argparse.Namespace, task: str, arm: str, log: Path) -> Iterator[tuple[float, int]]:
    """What is still to do: the rates on the tuning seed, then the best one on the other seeds."""
    for rate in args.rates:
        if not any(
            e["seed"] == TUNING_SEED and e["rate"] == rate for e in _entries(log, task, arm)
        ):
            yield rate, TUNING_SEED
    best = min(
        (e for e in _entries(log, task, arm) if e["seed"] == TUNING_SEED), key=lambda e: e["loss"]
    )
    for seed in args.seeds:
        if not any(
            e["seed"] == seed and e["rate"] == best["rate"] for e in _entries(log, task, arm)
        ):
            yield best["rate"], seed


def _entries(log: Path, task: str, arm: str) -> list[dict[str, Any]]:
    if not log.is_file():
        return []
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if (entry["task"], entry["arm"]) == (task, arm)]


def report(args: argparse.Namespace) -> None:
    """Writes table and curves of all runs in the log."""
    log = args.output / "learning.jsonl"
    lines = [
        "# What an equal budget teaches\n\n"
        f"Made by `python {' '.join(sys.argv)}` from `learning.jsonl`."
    ]
    for name in TASKS:
        found = {arm: _entries(log, name, arm) for arm in ARMS}
        found = {arm: entries for arm, entries in found.items() if entries}
        if found:
            lines.append(_table(name, found))
            _plot(name, found, args.output / f"learning-{name}.png")
    (args.output / "learning.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _table(name: str, found: dict[str, list[dict[str, Any]]]) -> str:
    task = TASKS[name]
    measure = "accuracy" if task.pairs else "loss"
    lines = [
        f"## {name}\n\n{task.steps} steps of {task.batch} x {task.length} tokens."
        f" The {measure} is that of held-out rows."
    ]
    lines.append(
        "\n| model | parameters | rates tried: "
        + measure
        + " | seeds: "
        + measure
        + " | seconds |\n|---|---:|---|---|---:|"
    )
    for arm, entries in found.items():
        tried = ", ".join(
            f"{e['rate']:g}: {e[measure]:.3f}" for e in entries if e["seed"] == TUNING_SEED
        )
        values = [e[measure] for e in entries if e["seed"] != TUNING_SEED]
        reached = (
            f"{statistics.mean(values):.3f}{_interval(values)} ({len(values)})" if values else ""
        )
        seconds = statistics.median(e["seconds"] for e in entries)
        lines.append(
            f"| {arm} | {entries[0]['parameters']:,} | {tried} | {reached} | {seconds:,.0f} |"
        )
    return "\n".join([lines[0], *lines[1:]])


def _interval(values: list[float]) -> str:
    """Half of the 95 % interval of a mean, by Student's t."""
    if len(values) - 1 not in STUDENT:
        return ""
    return f" ± {STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def _plot(name: str, found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    measure = "accuracy" if TASKS[name].pairs else "loss"
    for arm, entries in found.items():
        best = min(entries, key=lambda entry: entry["loss"])
        for axis, place in zip(axes, (0, 1)):
            axis.plot(
                [p[place] for p in best["curve"]],
                [p[2][measure] for p in best["curve"]],
                marker=".",
                label=arm,
            )
    axes[0].set_xlabel("steps")
    axes[1].set_xlabel("seconds")
    axes[0].set_ylabel(f"held-out {measure}")
    axes[0].legend(fontsize=8)
    figure.suptitle(name)
    figure.savefig(file, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--data", type=Path, help="folder with train.txt and validation.txt")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of log, table and curves"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=list(RATES),
        help="learning rates to try on the tuning seed",
    )
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=list(SEEDS), help="seeds of the best rate"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of each, to see that everything runs"
    )
    args = parser.parse_args(argv)
    if args.command == "report":
        report(args)
        return
    if args.data is None or not (args.data / "train.txt").is_file():
        parser.error(f"--data {args.data}: expected a folder with train.txt and validation.txt")
    run(args)


if __name__ == "__main__":
    main()
