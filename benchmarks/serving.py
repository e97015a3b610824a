"""Serving on a CPU: LION-S and ModernBERT in ONNX Runtime, whole and with weights of 8 bits.

    python benchmarks/serving.py                    # 10 minutes on one CPU core
    python benchmarks/serving.py --quick            # one layer, short rows

Both are encoders with random weights, 4 layers of width 256 with 4 heads, exported by one function
with dynamic axes; LION-S has the block of the modern presets. Both are also timed in torch. One
row, one thread. Equality with torch is checked before anything is timed. Leaves serving-cpu.md in
benchmarks/results, with --quick in outputs/benchmarks.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from learning_arms import MODERN
from measure import Group, assert_close, environment, table, time_group
from tqdm import tqdm
from transformers import ModernBertConfig, ModernBertModel

from lion_hf import LionConfig, LionModel
from lion_hf.tasks.export import TEXT_AXES, megabytes, quantize, write_onnx

LENGTHS = (128, 1024, 8192)
SIZES = {
    "vocab_size": 2000,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
SPECIAL = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
WHOLE, SMALL = "ONNX", "ONNX int8"
# Of the largest output. Int8 rounds weights and activations.
TOLERANCE = {WHOLE: 1e-4, SMALL: 0.2}
BASELINE = f"LION-S, {WHOLE}"


def build(layers: int) -> dict[str, torch.nn.Module]:
    """The encoders by their names, in evaluation."""
    torch.manual_seed(0)
    modern = MODERN | {"intermediate_size": 512}
    lion = LionConfig(mask_type="selective", num_hidden_layers=layers, **SIZES, **modern)
    bert = ModernBertConfig(
        num_hidden_layers=layers, intermediate_size=512, **SIZES, **dict.fromkeys(SPECIAL, 1)
    )
    models = {
        "LION-S": LionModel(lion, add_pooling_layer=False),
        "ModernBERT": ModernBertModel(bert),
    }
    return {name: model.eval() for name, model in models.items()}


def example(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, SIZES["vocab_size"], (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def export(name: str, model: torch.nn.Module, folder: Path) -> tuple[dict, list[str]]:
    """Sessions of a model by the names of their columns, and a row of the table of exports."""
    files = {kind: folder / f"{name} {kind}.onnx" for kind in (WHOLE, SMALL)}
    seconds = [time.perf_counter()]
    write_onnx(model, example(2, 9), TEXT_AXES, files[WHOLE])
    seconds.append(time.perf_counter())
    quantize(files[WHOLE], files[SMALL])
    seconds.append(time.perf_counter())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    open_session = partial(
        onnxruntime.InferenceSession, sess_options=options, providers=["CPUExecutionProvider"]
    )
    sessions = {kind: open_session(file) for kind, file in files.items()}
    inputs = example(3, 100)
    expected = model(**inputs).last_hidden_state.double()
    cells = [name, f"{seconds[1] - seconds[0]:.0f}", f"{seconds[2] - seconds[1]:.0f}"]
    for kind, session in sessions.items():
        found = run(session, inputs)
        assert_close(found, expected, TOLERANCE[kind], f"{name}, {kind}")
        error = (found - expected).abs().max() / expected.abs().max()
        cells += [f"{megabytes(files[kind]):.1f}", f"{error:.1e}"]
    return {f"{name}, {kind}": x for kind, x in sessions.items()}, cells


def run(session: onnxruntime.InferenceSession, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    (found,) = session.run(None, {x.name: inputs[x.name].numpy() for x in session.get_inputs()})
    return torch.from_numpy(found)


def group(models: dict, sessions: dict, length: int) -> Group:
    inputs = example(1, length)
    torches = {f"{name}, torch": partial(model, **inputs) for name, model in models.items()}
    runs = {name: partial(run, session, inputs) for name, session in sessions.items()}

    def check() -> None:
        for name, model in models.items():
            expected = model(**inputs).last_hidden_state.double()
            for kind, tolerance in TOLERANCE.items():
                assert_close(
                    runs[f"{name}, {kind}"](), expected, tolerance, f"{name}, {kind}, {length}"
                )

    return Group("serving", length, "forward, 1 row", runs | torches, BASELINE, check)


def exports_table(rows: list[list[str]]) -> str:
    """Difference is the largest one to torch as a share of the largest output."""
    head = ["model", "export (s)", "int8 (s)"]
    for kind in (WHOLE, SMALL):
        head += [f"{kind} (MB)", "difference"]
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one layer, short rows")
    parser.add_argument("--seconds", type=float, default=10, help="time for each length")
    parser.add_argument("--output", type=Path, help="folder of the report")
    args = parser.parse_args()
    output = args.output or Path("outputs/benchmarks" if args.quick else "benchmarks/results")
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    models = build(1 if args.quick else 4)
    about, rows, sessions, exports = environment("cpu", "float32"), [], {}, []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, tqdm(disable=None) as progress:
        for name, model in models.items():
            found, cells = export(name, model, Path(folder))
            sessions |= found
            exports.append(cells)
        for length in (16, 70) if args.quick else LENGTHS:
            seconds = 0 if args.quick else args.seconds
            rows.append(time_group(group(models, sessions, length), "cpu", seconds, progress))
            parts = [table(about, rows, "ms"), "### export", exports_table(exports)]
            (output / "serving-cpu.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print((output / "serving-cpu.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
