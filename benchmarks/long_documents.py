"""Time and memory of `encode_long` on a CPU, for documents of several lengths.

    python benchmarks/long_documents.py [--preset P] [--layers N] [--lengths 10000 100000 1000000]

Each length has a process of its own, with one thread. Memory is the largest amount of anonymous
memory (`RssAnon` of Linux) above that with the weights loaded; mapped files do not count. Ids are
random. Rows of the report are appended to --output.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from measure import anonymous_peak

import lion_hf
from lion_hf.presets import find_preset

HEAD = """| model | layers | width | tokens | CPU s | us per token and layer | wall s | memory |
|---|---:|---:|---:|---:|---:|---:|---:|"""


def measure(args: argparse.Namespace) -> dict:
    """Encodes one document, with a mean over each 1,000 tokens."""
    torch.set_num_threads(1)
    config = lion_hf.LionConfig.from_pretrained(find_preset(args.preset))
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    model = lion_hf.LionModel(config).eval()
    ids = torch.randint(5, config.vocab_size, (args.length,))
    model.encode_long(ids[:1000])
    wall, cpu = time.perf_counter(), time.process_time()
    memory = anonymous_peak(lambda: model.encode_long(ids, spans=1000, cache=args.cache))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    layers, width = config.num_hidden_layers, config.hidden_size
    return {"layers": layers, "width": width, "cpu": cpu, "wall": wall, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="lion-s-base", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, help="other than the preset's")
    lengths = [10_000, 100_000, 1_000_000]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="in tokens")
    parser.add_argument("--cache", help="folder for the hidden states, an empty one per length")
    parser.add_argument("--output", type=Path, help="a report to append to")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)  # one, in this process
    args = parser.parse_args()
    if args.length:
        print(json.dumps(measure(args)))
        return
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, one thread"
    command = f"    python benchmarks/long_documents.py {' '.join(sys.argv[1:])}".rstrip()
    lines = ["", versions, "", command, "", HEAD]
    for length in args.lengths:
        command = [sys.executable, __file__, *sys.argv[1:], "--length", str(length)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(result.stdout)
        each = found["cpu"] / length / found["layers"] * 1e6
        shape = f"{found['layers']} | {found['width']} | {length:,}"
        times = f"{found['cpu']:,.1f} | {each:.0f} | {found['wall']:,.1f}"
        lines.append(f"| {args.preset} | {shape} | {times} | {found['memory']:,.0f} MiB |")
        print(lines[-1], flush=True)
    if args.output:
        with args.output.open("a", encoding="utf-8") as report:
            report.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
