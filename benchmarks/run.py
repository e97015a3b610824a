"""Measures LION beside softmax attention, BERT, ModernBERT and ViT on this machine.

Equality is checked before speed.

    pip install -e ".[benchmark]"

    # every suite; about 45 minutes on two CPU cores
    python benchmarks/run.py all
    # one suite, some lengths
    python benchmarks/run.py op --lengths 197 1024
    # small models and lengths, to see that everything runs
    python benchmarks/run.py all --quick
    # bfloat16; beside flash-linear-attention too, see peers.py
    python benchmarks/run.py all --device cuda
    # rows for the kernels' table `BLOCKS`, see blocks.py
    python benchmarks/run.py blocks --device cuda
    # all that a GPU should be asked, the kernels' tests first, within 25 minutes; see gpu.py
    python benchmarks/run.py gpu

Suites: op (the operation alone); model (whole encoders, and padding), train (training steps),
memory and training-memory (peaks), these four in encoders.py; chunks (forms and chunk sizes, from
which `choose_form` and `CHUNK_SIZES` are filled in); forms (where the three forms cross). Each
leaves SUITE-DEVICE.json, .md and .png in benchmarks/results, with --quick in outputs/benchmarks.
Errors are measured by benchmarks/precision.py.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import gpu
import torch
from encoders import (
    FAMILIES,
    LONGEST_PEER,
    memory_suite,
    model_suite,
    train_suite,
    training_memory_suite,
)
from measure import TOLERANCE, Group, Row, assert_close, environment, plot, rates, save, time_group
from peers import Peer, load_peers
from torch.nn import functional as F
from tqdm import tqdm

from lion_hf import lion_attention
from lion_hf.modeling.configuration_lion import FORMS

HEADS, HEAD_DIM = 12, 64
OP_LENGTHS = (128, 197, 512, 1024, 4096, 16_384, 65_536)
CUDA_OP_LENGTHS = (128, 197, 512, 1024, 4096, 8192, 16_384, 65_536, 1_048_576)
CHUNK_LENGTHS = (16, 32, 64, 128, 197, 256, 512, 1024, 4096)
CUDA_CHUNK_LENGTHS = (128, 197, 256, 512, 1024, 2048, 4096, 16_384)
FORM_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
QUICK_LENGTHS = (64, 200)


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    suites = [*SUITES, "blocks", "all", "gpu"]
    add("suite", choices=suites, help="what to measure; blocks is not among all")
    add("--minutes", type=float, default=25, help="of gpu, which goes on when it is called again")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    types = "default: float32 on the CPU, bfloat16 on a GPU"
    add("--dtype", choices=("float32", "bfloat16"), help=types)
    lengths = "tokens per row; default: those of the suite"
    add("--lengths", type=int, nargs="+", metavar="L", help=lengths)
    add("--compile", action="store_true", help="torch.compile every model, the peers too")
    seconds = "time for each group of functions; default: 10 on the CPU, 3 on a GPU"
    add("--seconds", type=float, help=seconds)
    add("--quick", action="store_true", help="small models, two short lengths")
    add("--output", type=Path, help="folder of the reports")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.device = "cuda" if args.suite == "gpu" else args.device
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.seconds = (10 if args.device == "cpu" else 3) if args.seconds is None else args.seconds
    args.output = args.output or Path("outputs/benchmarks" if args.quick else "benchmarks/results")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"{args.suite} --device cuda: torch finds no CUDA device here; use --device cpu")
    if args.suite == "blocks" and args.device != "cuda":
        sys.exit("blocks: times the kernels of a GPU; add --device cuda, on a machine that has one")
    if args.lengths and min(args.lengths) < 1:
        sys.exit(f"--lengths {min(args.lengths)}: expected integers of at least 1")
    if args.quick:
        args.lengths, args.seconds = args.lengths or QUICK_LENGTHS, 0
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        sys.exit(f"--output {args.output}: this path is or goes through a file; give a folder")
    if args.suite == "blocks":
        from blocks import tune  # here, not above: it needs triton

        tune(args)
        return
    if args.suite == "gpu":
        about = environment(args.device, args.dtype)
        missing = gpu.run(gpu.steps(args.output), args.output, args.minutes, about)
        sys.exit(f"not done: {', '.join(missing)}; the same command goes on" if missing else None)
    suites = SUITES if args.suite == "all" else (args.suite,)
    failures = sum(measure(suite, args) for suite in suites)
    if failures:
        sys.exit(f"{failures} of the groups failed, see above; the reports have no rows of them")


def measure(suite: str, args: argparse.Namespace) -> int:
    """Runs a suite and leaves its three reports. Returns how many groups failed.

    The figures of the other groups are kept.
    """
    torch.manual_seed(0)
    about, rows, limits = environment(args.device, args.dtype), [], None
    if suite == "op":
        limits = rates(args.device, getattr(torch, args.dtype))
        about["limits"] = (
            f"a copy's {limits[0] / 1e9:,.0f} GB/s and a matrix product's"
            f" {limits[1] / 1e9:,.0f} GFLOP/s"
        )
    name = "-".join(
        [
            suite,
            args.device,
            *(["bfloat16"] if (args.device, args.dtype) == ("cpu", "bfloat16") else []),
        ]
    )
    name += "-compiled" if args.compile else ""
    unit = "MiB" if suite.endswith("memory") else "ms"
    failures = 0
    with tqdm(list(SUITES[suite](args)), desc=suite, unit="group") as progress:
        for build in progress:
            try:
                rows.append(_row(build, args, progress, limits))
            except Exception:
                progress.write(traceback.format_exc(), file=sys.stderr)
                failures += 1
            else:
                save(args.output, name, about, rows, unit)
    if rows:
        plot(args.output / f"{name}.png", about, rows, unit)
        print((args.output / f"{name}.md").read_text())
    return failures


def _row(
    build: Callable, args: argparse.Namespace, progress: tqdm, limits: tuple[float, float] | None
) -> Row:
    """What a suite yields, measured; its tensors are gone before the next one's are made."""
    group = build()
    return (
        group
        if isinstance(group, Row)
        else time_group(group, args.device, args.seconds, progress, limits)
    )


def op_suite(args: argparse.Namespace) -> Iterator:
    """The operation beside softmax attention, 12 heads of 64 in the layout that projections leave.

    One row on the CPU. A GPU would wait for Python, so it gets 65,536 tokens in as many rows as
    they make.
    """
    lengths, peers = args.lengths or (OP_LENGTHS if args.device == "cpu" else CUDA_OP_LENGTHS), {}
    if args.device == "cuda":
        peers = load_peers()
        print("the peers' kernels are compiled and tuned, which may take minutes", file=sys.stderr)
        # Kernels that tune themselves do so in the first call, whatever its length: it shall not be
        # a short one.
        with suppress(Exception):  # what fails here fails again in its group
            op_group(
                args,
                max((n for n in lengths if n <= 8192), default=8192),
                "forward + backward",
                peers,
            ).check()
    for what in ("forward", "forward + backward"):
        for length in lengths:
            if what == "forward" or length <= (4096 if args.device == "cpu" else 65_536):
                yield partial(op_group, args, length, what, peers)


def op_group(args: argparse.Namespace, length: int, what: str, peers: dict[str, Peer]) -> Group:
    """The operation of the three families beside softmax attention and the peers."""
    dtype, training = getattr(torch, args.dtype), what != "forward"
    batch = 1 if args.device == "cpu" or args.quick else max(1, 65_536 // length)
    shape = (batch, length, HEADS, HEAD_DIM)
    operands = [_leaf(torch.randn(shape), args, training).transpose(1, 2) for _ in range(3)]
    gates: dict[str, torch.Tensor | None] = {"LION-lit": None}
    for name, size in (("LION-D", (1, HEADS, 1)), ("LION-S", (batch, HEADS, length))):
        log_decay = F.logsigmoid(torch.randn(size) + 3)
        gates[name] = _leaf(log_decay, args, training, torch.float32)
    calls = {name: partial(lion_attention, *operands, x) for name, x in gates.items()}
    softmax = "SDPA" if length <= LONGEST_PEER[args.device] else None
    if softmax:
        calls[softmax] = partial(F.scaled_dot_product_attention, *operands)
        for name, peer in peers.items():
            calls[name] = partial(peer.function, *operands, gates[peer.family])
    grad = torch.randn(shape, device=args.device, dtype=dtype).transpose(1, 2)
    functions = _timed(calls, grad, training)

    def check() -> None:
        title = f"{what}, {length} tokens"
        for name, log_decay in gates.items():
            inputs = (*operands, log_decay)
            found = _results(calls[name], inputs, grad, training)
            expected = _exact_head(inputs, grad, args.device, training)
            _assert_head(found, expected, TOLERANCE[dtype], f"{name}, {title}")
            for other in [x for x in peers if x in functions and peers[x].family == name]:
                learned = inputs if peers[other].learns_gates else inputs[:3]
                try:  # it may round more often than ours
                    found = _results(calls[other], learned, grad, training)
                    _assert_head(found, expected, 2 * TOLERANCE[dtype], "beside the definition")
                # of a library that does not serve this machine, length or pass
                except Exception as error:
                    tqdm.write(f"{other}, {title}: left out: {error}", file=sys.stderr)
                    del functions[other]

    least = {name: least_work(name, length, dtype, training) for name in FAMILIES}
    work = {name: [batch * n for n in needed] for name, needed in least.items()}
    beside = {peer.family: name for name, peer in peers.items()}  # the last of each family
    shown = f"{what}, {batch} row{'s' * (batch > 1)}" if args.device == "cuda" else what
    return Group("operation", length, shown, functions, softmax, check, work, beside)


def _exact_head(
    inputs: tuple, grad: torch.Tensor, device: str, training: bool
) -> list[torch.Tensor]:
    """Results of one head in float64, token by token, or for very long rows by chunks."""
    one = [
        None if x is None else x.detach()[:, :1].double().requires_grad_(training) for x in inputs
    ]
    longest = 4096 if training or device == "cuda" else 65_536
    form = "recurrent" if grad.shape[2] <= longest else "chunk"
    exact = partial(lion_attention, *one, form=form, chunk_size=100)
    return _results(exact, one, grad[:, :1].double(), training)


def _assert_head(
    found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float, what: str
) -> None:
    """Raises AssertionError unless the first head's results are those expected."""
    for x, y in zip(found, expected):
        # LION-D's gate has one gradient per head, which may come out small: all heads together give
        # the scale.
        assert_close(x[:, :1], y, tolerance, what, x.abs().max().item())


def least_work(name: str, length: int, dtype: torch.dtype, training: bool) -> tuple[float, float]:
    """Bytes and operations that are needed.

    Every tensor is moved once, and products are those of one chunk or of chunks of 64.
    """
    tokens, chunk = HEADS * length, 64
    moved = 4 + 7 * training  # query, key, value, output; and four of them with three gradients
    # operations per token for each chunk x head_dim, and head_dim ** 2
    inside, through = 4 + 10 * training, 8 + 16 * training
    many = inside * chunk * HEAD_DIM + through * HEAD_DIM**2
    if name == "LION-lit":  # one state for both directions, and nothing inside
        many = (4 + 8 * training) * HEAD_DIM**2
    return moved * tokens * HEAD_DIM * dtype.itemsize, tokens * min(
        many, inside * length * HEAD_DIM
    )


def chunks_suite(args: argparse.Namespace) -> Iterator:
    """Forms and chunk sizes of LION-S beside each other.

    It is the source of `choose_form` and `CHUNK_SIZES`.
    """
    for what in ("forward", "forward + backward"):
        if args.device == "cuda":  # rows enough that it does not wait for Python
            for length in args.lengths or CUDA_CHUNK_LENGTHS:
                yield partial(
                    chunks_group, args, length, 1 if args.quick else max(1, 16_384 // length), what
                )
            continue
        for length in args.lengths or CHUNK_LENGTHS:
            for batch in (1, 16) if length <= 64 else (1,):
                yield partial(chunks_group, args, length, batch, what)


def chunks_group(args, length: int, batch: int, what: str) -> Group:
    training = what != "forward"
    query, key, value = (
        _leaf(torch.randn(batch, length, HEADS, HEAD_DIM), args, training).transpose(1, 2)
        for _ in range(3)
    )
    log_decay = _leaf(
        F.logsigmoid(torch.randn(batch, HEADS, length) + 3), args, training, torch.float32
    )
    call = partial(lion_attention, query, key, value, log_decay)
    calls = {"auto": call}
    if length <= 1024:
        calls["attention"] = partial(call, form="attention")
        calls["one chunk"] = partial(call, form="chunk", chunk_size=length)
    for size in (32, 64, 128, 256, 512) if args.device == "cpu" else (64, 128, 256, 512, 1024):
        if size < length:
            calls[f"chunks of {size}"] = partial(call, form="chunk", chunk_size=size)
    grad = torch.randn(
        batch, length, HEADS, HEAD_DIM, device=args.device, dtype=query.dtype
    ).transpose(1, 2)
    check = partial(_assert_agree, calls, "auto", (query, key, value, log_decay), grad, training)
    what += (
        f" of {batch} row{'s' * (batch > 1)}" if args.device == "cpu" else f", {batch} x {length}"
    )
    return Group(
        "forms and chunk sizes", length, what, _timed(calls, grad, training), "auto", check
    )


def forms_suite(args: argparse.Namespace) -> Iterator:
    """The three forms of LION-lit and LION-S beside each other, one row: where they cross."""
    for what in ("forward", "forward + backward"):
        for name in ("LION-lit", "LION-S"):
            for length in args.lengths or FORM_LENGTHS:
                yield partial(forms_group, args, name, length, what)


def forms_group(args, name: str, length: int, what: str) -> Group:
    training = what != "forward"
    query, key, value = (
        _leaf(torch.randn(1, length, HEADS, HEAD_DIM), args, training).transpose(1, 2)
        for _ in range(3)
    )
    log_decay = None
    if name == "LION-S":
        log_decay = _leaf(
            F.logsigmoid(torch.randn(1, HEADS, length) + 3), args, training, torch.float32
        )
    calls = {
        form: partial(lion_attention, query, key, value, log_decay, form=form) for form in FORMS
    }
    grad = torch.randn(1, length, HEADS, HEAD_DIM, device=args.device, dtype=query.dtype).transpose(
        1, 2
    )
    check = partial(
        _assert_agree, calls, "recurrent", (query, key, value, log_decay), grad, training
    )
    return Group("forms", length, f"{name} {what}", _timed(calls, grad, training), "chunk", check)


def _leaf(
    x: torch.Tensor, args, requires_grad: bool, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return x.to(args.device, dtype or getattr(torch, args.dtype)).requires_grad_(requires_grad)


def _timed(calls: dict, grad: torch.Tensor, training: bool) -> dict:
    """What is timed of operations: the forward pass without gradients, or both passes.

    Gradients are those of the calls' arguments, which `backward` would add to the last turn's:
    three more reads and writes.
    """
    if not training:
        return {name: torch.no_grad()(call) for name, call in calls.items()}
    leaves = {
        name: [x for x in call.args if torch.is_tensor(x) and x.requires_grad]
        for name, call in calls.items()
    }
    return {
        name: lambda call=call, leaves=leaves[name]: torch.autograd.grad(
            call(), leaves, grad, allow_unused=True
        )
        for name, call in calls.items()
    }


def _results(function, inputs, grad: torch.Tensor, training: bool) -> list[torch.Tensor]:
    """The output, and if training the gradient of every input."""
    output = function()
    if not training:
        return [output.detach()]
    return [
        output.detach(),
        *torch.autograd.grad(output, [x for x in inputs if x is not None], grad),
    ]


def _assert_agree(calls: dict, reference: str, inputs, grad: torch.Tensor, training: bool) -> None:
    """Raises AssertionError unless all calls give what the one named `reference` gives."""
    results = {name: _results(function, inputs, grad, training) for name, function in calls.items()}
    for name, found in results.items():
        for x, y in zip(found, results[reference]):
            assert_close(
                x,
                y.double(),
                TOLERANCE[grad.dtype],
                f"{name} beside {reference}, {grad.shape[2]} tokens",
            )


SUITES = {
    "op": op_suite,
    "model": model_suite,
    "train": train_suite,
    "memory": memory_suite,
    "training-memory": training_memory_suite,
    "chunks": chunks_suite,
    "forms": forms_suite,
}

if __name__ == "__main__":
    main()
