"""The modern block beside ModernBERT of its size and depth, in training steps and forward passes.

    python benchmarks/modern_block.py                       # width 128, 4 layers, one thread
    python benchmarks/modern_block.py --width 768 --layers 2 --batches 128:4 512:1
    python benchmarks/modern_block.py --quick --output OUT  # in seconds, to see that it runs

It leaves modern-WIDTH.json and .md. The models are those of learning_arms.py. A turn calls every
model once, and what counts is the CPU time of the process, so that other jobs matter less. First
the gradient of the words must be the same in the chunk and in the attention form.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import learning_arms
import torch
from learning import take_step
from measure import Row, assert_close, environment, in_turns, save
from tqdm import tqdm
from transformers import PreTrainedModel

BATCHES = ("128:16", "512:4", "2048:1")
ARMS = ("modern LION-lit", "modern LION-D", "modern LION-S", "BERT", "ModernBERT")
BASELINE = "ModernBERT"
WORDS = 8192
RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--width", type=int, default=128, help="hidden size, a multiple of 128")
    add("--layers", type=int, default=4)
    add("--batches", nargs="+", default=BATCHES, metavar="LENGTH:ROWS", help="what is measured")
    add("--turns", type=int, default=9, help="calls of every model")
    add("--quick", action="store_true", help="short rows, two turns")
    add("--output", type=Path, default=RESULTS, help="folder of the reports")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.turns, args.layers = ["64:2"], 2, 1
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    cases = [
        (*map(int, batch.split(":")), what)
        for batch in args.batches
        for what in ("training step", "forward")
    ]
    for case in tqdm(cases, desc="cases"):
        rows.append(measure(args, *case))
        save(args.output, f"modern-{args.width}", environment("cpu", "float32"), rows, "ms")
    print((args.output / f"modern-{args.width}.md").read_text())


def measure(args: argparse.Namespace, length: int, batch: int, what: str) -> Row:
    """A row of the report."""
    torch.manual_seed(0)
    input_ids = torch.randint(5, WORDS, (batch, length))
    labels = torch.where(torch.rand(batch, length) < 0.3, input_ids, -100)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    calls: dict[str, Callable[[], object]] = {}
    for name in ARMS:
        model = build(name, args.width, args.layers, length)
        if name.startswith("modern LION"):
            check(name, model, inputs | {"labels": labels})
        if what == "forward":
            calls[name] = torch.no_grad()(partial(model.eval().base_model, **inputs))
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            calls[name] = partial(take_step, model, optimizer, inputs | {"labels": labels})
    times = in_turns(calls, args.turns)
    row = Row("modern block", length, f"{what}, {batch} x {length}", BASELINE, {})
    row.repeats = args.turns
    for name, found in times.items():
        row.values[name] = 1e3 * statistics.median(found)
        if name != BASELINE:
            ratios = [a / b for a, b in zip(found, times[BASELINE])]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row.ratios[name] = low, middle, high
    return row


def build(name: str, width: int, layers: int, length: int) -> PreTrainedModel:
    """An arm of the learning benchmark in another width and depth, heads of 32 to 64."""
    factor = width // learning_arms.WIDTH
    model = learning_arms.ARMS[name](WORDS, length)
    config = model.config
    config.hidden_size, config.num_hidden_layers = width, layers
    config.num_attention_heads = max(learning_arms.HEADS, width // 64)
    config.intermediate_size *= factor
    config.initializer_range = width**-0.5
    return type(model)(type(config)(**rebuilt(config)))


def rebuilt(config) -> dict:
    """The fields of a configuration, to build another one; those that depend on depth are left."""
    left_out = ("layer_types", "transformers_version", "architectures", "model_type")
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def check(name: str, model: PreTrainedModel, inputs: dict) -> None:
    """Raises AssertionError unless chunk and attention form give the words the same gradient."""
    weight, found = model.get_input_embeddings().weight, {}
    for form in ("attention", "auto"):
        model.eval().config.attention_form = form
        found[form] = torch.autograd.grad(model(**inputs).loss, weight)[0]
    assert_close(found["auto"], found["attention"].double(), 1e-3, f"gradient of {name}")


if __name__ == "__main__":
    main()
