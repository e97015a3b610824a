"""Measures LION beside softmax attention, BERT, ModernBERT and ViT on this machine. Equality is checked before speed.

    pip install -e ".[benchmark]"
    python benchmarks/run.py all                          # every suite; about 45 minutes on two CPU cores
    python benchmarks/run.py op --lengths 197 1024        # one suite, some lengths
    python benchmarks/run.py all --quick                  # small models and lengths, to see that everything runs
    python benchmarks/run.py all --device cuda            # bfloat16; beside flash-linear-attention too, see peers.py

Suites: op (the operation alone), model (whole encoders, and padding), train (training steps), memory and training-memory
(peaks), chunks (forms and chunk sizes, from which `choose_form` and `CHUNK_SIZES` are filled in), forms (where the three forms
cross). Each leaves SUITE-DEVICE.json, .md and .png in benchmarks/results, with --quick in outputs/benchmarks. Errors are
measured by benchmarks/precision.py.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from measure import Group, Row, environment, peak_memory, rates, save, time_group
from peers import Peer, load_peers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM, BertModel, ModernBertConfig, ModernBertModel, ViTConfig, ViTModel

from lion_hf import LionConfig, LionForMaskedLM, LionModel, lion_attention
from lion_hf.modeling.lion_ops import FORMS

FAMILIES = {"LION-lit": "lit", "LION-D": "decay", "LION-S": "selective"}
HEADS, HEAD_DIM, WORDS = 12, 64, 30_522
OP_LENGTHS = (128, 197, 512, 1024, 4096, 16_384, 65_536)
CUDA_OP_LENGTHS = (128, 197, 512, 1024, 4096, 8192, 16_384, 65_536, 1_048_576)
MODEL_ROWS = {128: 8, 512: 2, 1024: 1, 4096: 1, 16_384: 1}  # length -> rows of the batch
CUDA_MODEL_ROWS = {128: 64, 512: 16, 2048: 4, 8192: 1, 16_384: 1}
TRAIN_ROWS = {128: 8, 512: 2, 2048: 1}
CUDA_TRAIN_ROWS = {128: 64, 512: 16, 2048: 4, 8192: 1}
MEMORY_LENGTHS = (8192, 16_384, 32_768, 65_536)
TRAINING_MEMORY_LENGTHS = (1024, 4096)
QUICK_LENGTHS = (64, 200)
# Softmax attention is quadratic: beyond these lengths a call takes minutes on a CPU.
LONGEST_PEER = {"cpu": 16_384, "cuda": 65_536}
LONGEST_MODERNBERT = 4096
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6}  # relative to the largest entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "all"], help="what to measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="L", help="tokens a row; default: those of the suite")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model, the peers too")
    parser.add_argument("--seconds", type=float, default=10, help="time for each group of functions (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small models, two short lengths")
    parser.add_argument("--output", type=Path, help="folder of the reports")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.output = args.output or Path("outputs/benchmarks" if args.quick else "benchmarks/results")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device here; use --device cpu")
    if args.lengths and min(args.lengths) < 1:
        sys.exit(f"--lengths {min(args.lengths)}: expected integers of at least 1")
    if args.quick:
        args.lengths, args.seconds = args.lengths or QUICK_LENGTHS, 0
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        sys.exit(f"--output {args.output}: this path is or goes through a file; give a folder")
    for suite in SUITES if args.suite == "all" else (args.suite,):
        measure(suite, args)


def measure(suite: str, args: argparse.Namespace) -> None:
    """Runs a suite and leaves its three reports."""
    torch.manual_seed(0)
    about, rows, limits = environment(args.device, args.dtype), [], None
    if suite == "op":
        limits = rates(args.device, getattr(torch, args.dtype))
        about["limits"] = f"a copy's {limits[0] / 1e9:,.0f} GB/s and a matrix product's {limits[1] / 1e9:,.0f} GFLOP/s"
    name = "-".join([suite, args.device, *(["bfloat16"] if (args.device, args.dtype) == ("cpu", "bfloat16") else [])])
    name += "-compiled" if args.compile else ""
    unit = "MiB" if suite.endswith("memory") else "ms"
    with tqdm(list(SUITES[suite](args)), desc=suite, unit="group") as progress:
        for build in progress:
            group = build()
            rows.append(group if isinstance(group, Row) else time_group(group, args.device, args.seconds, progress, limits))
            save(args.output, name, about, rows, unit)
    print((args.output / f"{name}.md").read_text())


def op_suite(args: argparse.Namespace) -> Iterator:
    """The operation beside softmax attention: one row, 12 heads of 64, in the layout that projections leave."""
    lengths, peers = args.lengths or (OP_LENGTHS if args.device == "cpu" else CUDA_OP_LENGTHS), {}
    if args.device == "cuda":
        peers = load_peers()
        print("the peers' kernels are compiled and tuned, which may take minutes", file=sys.stderr)
        # Kernels that tune themselves do so in the first call, whatever its length: it shall not be a short one.
        op_group(args, max((n for n in lengths if n <= 8192), default=8192), "forward + backward", peers).check()
    for what in ("forward", "forward + backward"):
        for length in lengths:
            if what == "forward" or length <= (4096 if args.device == "cpu" else 65_536):
                yield partial(op_group, args, length, what, peers)


def op_group(args, length: int, what: str, peers: dict[str, Peer]) -> Group:
    dtype, training = getattr(torch, args.dtype), what != "forward"
    query, key, value = (_leaf(torch.randn(1, length, HEADS, HEAD_DIM), args, training).transpose(1, 2) for _ in range(3))
    gates = {
        "LION-lit": None,
        "LION-D": _leaf(F.logsigmoid(torch.randn(1, HEADS, 1) + 3), args, training, torch.float32),
        "LION-S": _leaf(F.logsigmoid(torch.randn(1, HEADS, length) + 3), args, training, torch.float32),
    }
    calls = {name: partial(lion_attention, query, key, value, log_decay) for name, log_decay in gates.items()}
    softmax = "SDPA" if length <= LONGEST_PEER[args.device] else None
    if softmax:
        calls[softmax] = partial(F.scaled_dot_product_attention, query, key, value)
        calls |= {name: partial(peer.function, query, key, value, gates[peer.family]) for name, peer in peers.items()}
    grad = torch.randn(1, length, HEADS, HEAD_DIM, device=args.device, dtype=dtype).transpose(1, 2)
    functions = _timed(calls, grad, training)

    def check() -> None:
        """One head against the definition, token by token in float64; very long rows against chunks in float64."""
        for name, log_decay in gates.items():
            inputs = (query, key, value, log_decay)
            found = _results(calls[name], inputs, grad, training)
            one = [None if x is None else x.detach()[:, :1].double().requires_grad_(training) for x in inputs]
            form = "recurrent" if length <= (4096 if training or args.device == "cuda" else 65_536) else "chunk"
            exact = partial(lion_attention, *one, form=form, chunk_size=100)
            expected = _results(exact, one, grad[:, :1].double(), training)
            for x, y in zip(found, expected):
                # LION-D's gate has one gradient a head, which may come out small: all heads together give the scale.
                _assert_close(x[:, :1], y, TOLERANCE[dtype], f"{name}, {what}, {length} tokens", x.abs().max().item())
            for other in [x for x in peers if x in functions and peers[x].family == name]:
                try:  # it may round more often than ours
                    found = _results(calls[other], inputs if peers[other].learns_gates else inputs[:3], grad, training)
                    for x, y in zip(found, expected):
                        _assert_close(x[:, :1], y, 2 * TOLERANCE[dtype], "beside the definition", x.abs().max().item())
                except Exception as error:  # of a library that does not serve this machine, length or pass
                    tqdm.write(f"{other}, {what}, {length} tokens: left out: {error}", file=sys.stderr)
                    del functions[other]

    work = {name: least_work(name, length, dtype, training) for name in FAMILIES}
    beside = {peer.family: name for name, peer in peers.items()}
    return Group("operation", length, what, functions, softmax, check, work, beside)


def least_work(name: str, length: int, dtype: torch.dtype, training: bool) -> tuple[float, float]:
    """Bytes and operations that are needed: every tensor moved once, and products as in one chunk or in chunks of 64."""
    tokens, chunk = HEADS * length, 64
    moved = 4 + 7 * training  # query, key, value, output; and four of them with three gradients
    inside, through = 4 + 10 * training, 8 + 16 * training  # operations a token for each chunk x head_dim, and head_dim ** 2
    many = inside * chunk * HEAD_DIM + through * HEAD_DIM**2
    if name == "LION-lit":  # one state for both directions, and nothing inside
        many = (4 + 8 * training) * HEAD_DIM**2
    return moved * tokens * HEAD_DIM * dtype.itemsize, tokens * min(many, inside * length * HEAD_DIM)


def model_suite(args: argparse.Namespace) -> Iterator:
    """Whole encoders of base size without gradients: text, images, and text of which half is padding."""
    for length, batch in _rows_of(args, MODEL_ROWS, CUDA_MODEL_ROWS).items():
        yield partial(text_group, args, length, batch)
    yield partial(image_group, args)
    yield partial(padding_group, args)


def text_group(args, length: int, batch: int) -> Group:
    size = sizes(args)
    models = {name: LionModel(LionConfig(mask_type=t, max_position_embeddings=length, **size)) for name, t in FAMILIES.items()}
    baseline = "BERT" if length <= LONGEST_PEER[args.device] else None
    if baseline:
        models[baseline] = BertModel(BertConfig(max_position_embeddings=length, attn_implementation="sdpa", **size))
    if length <= LONGEST_MODERNBERT:  # its MLPs have three matrices, so that 2/3 of the width is the same size
        size["intermediate_size"] = size["intermediate_size"] * 2 // 3
        config = ModernBertConfig(max_position_embeddings=length, pad_token_id=0, attn_implementation="sdpa", **size)
        models["ModernBERT"] = ModernBertModel(config)
    inputs = {"input_ids": torch.randint(1000, WORDS, (batch, length), device=args.device)}
    return _model_group(args, "text encoder", length, f"forward, {batch} x {length}", models, baseline, inputs)


def image_group(args) -> Group:
    size = sizes(args) | {"image_size": 224, "patch_size": 16}
    del size["vocab_size"]
    models = {name: LionModel(LionConfig(modality="image", mask_type=t, **size)) for name, t in FAMILIES.items()}
    for name in ("LION-D", "LION-S"):
        config = LionConfig(modality="image", mask_type=FAMILIES[name], patch_order="snake", **size)
        models[f"{name} snake"] = LionModel(config)
    models["ViT"] = ViTModel(ViTConfig(attn_implementation="sdpa", **size))
    batch = 2 if args.quick else 8 if args.device == "cpu" else 128
    inputs = {"pixel_values": torch.randn(batch, 3, 224, 224, device=args.device, dtype=getattr(torch, args.dtype))}
    return _model_group(args, "image encoder", 197, f"forward, {batch} images of 224 px", models, "ViT", inputs)


def _model_group(args, suite, length, what, models, baseline, inputs) -> Group:
    models = {name: model.to(args.device, getattr(torch, args.dtype)).eval() for name, model in models.items()}
    run = {name: torch.compile(model) if args.compile else model for name, model in models.items()}

    def check() -> None:
        """The forms of every LION model give the same; where rows are long, LION-lit token by token, the others in chunks."""
        for name, model in models.items():
            if not isinstance(model, LionModel):
                continue
            output = run[name](**inputs).last_hidden_state
            for form in ("recurrent", "chunk") if length <= 512 else ("recurrent" if name == "LION-lit" else "chunk",):
                model.config.attention_form, model.config.chunk_size = form, 100
                expected = model(**inputs).last_hidden_state.double()
                model.config.attention_form, model.config.chunk_size = "auto", None
                _assert_close(output, expected, 10 * TOLERANCE[getattr(torch, args.dtype)], f"{name}, {form} form, {what}")

    functions = {name: torch.no_grad()(partial(model, **inputs)) for name, model in run.items()}
    return Group(suite, length, what, functions, baseline, torch.no_grad()(check))


def padding_group(args) -> Group:
    """The same model on a batch without padding, and on one of which half the tokens are padding, at varied lengths."""
    batch, length = (8, 512) if not args.quick else (4, 64)
    config = LionConfig(mask_type="selective", max_position_embeddings=length, **sizes(args))
    model = LionModel(config).to(args.device, getattr(torch, args.dtype)).eval()
    input_ids = torch.randint(1000, WORDS, (batch, length), device=args.device)
    real = torch.linspace(length // batch, length - length // batch, batch, device=args.device).round()  # half of all
    mask = (torch.arange(length, device=args.device) < real[:, None]).long()
    run = torch.compile(model) if args.compile else model
    full = partial(run, input_ids, torch.ones_like(mask))
    padded = partial(run, input_ids, mask)

    def check() -> None:
        output = padded().last_hidden_state
        for row in range(batch):
            alone = model(input_ids[row : row + 1, mask[row] == 1]).last_hidden_state
            close = 10 * TOLERANCE[getattr(torch, args.dtype)]
            _assert_close(output[row : row + 1, mask[row] == 1], alone.double(), close, f"padded row {row}")

    functions = {"full": torch.no_grad()(full), "half of it padding": torch.no_grad()(padded)}
    return Group("padding", length, f"LION-S forward, {batch} x {length}", functions, "full", torch.no_grad()(check))


def train_suite(args: argparse.Namespace) -> Iterator:
    """Masked-LM training steps of base size with AdamW, without dropout of scores, which would need the attention form."""
    for length, batch in _rows_of(args, TRAIN_ROWS, CUDA_TRAIN_ROWS).items():
        yield partial(train_group, args, length, batch)


def train_group(args, length: int, batch: int) -> Group:
    size = sizes(args) | {"max_position_embeddings": length, "attention_probs_dropout_prob": 0.0}
    models = {name: LionForMaskedLM(LionConfig(mask_type=t, **size)) for name, t in FAMILIES.items()}
    models["LION-S, sparse prediction"] = LionForMaskedLM(LionConfig(sparse_prediction=True, **size))
    models["LION-S, sparse prediction"].load_state_dict(models["LION-S"].state_dict())
    models["BERT"] = BertForMaskedLM(BertConfig(attn_implementation="sdpa", **size))
    input_ids = torch.randint(1000, WORDS, (batch, length), device=args.device)
    labels = torch.where(torch.rand(batch, length, device=args.device) < 0.3, input_ids, -100)
    models = {name: model.to(args.device).train() for name, model in models.items()}
    run = {name: torch.compile(model) if args.compile else model for name, model in models.items()}

    def loss_of(model) -> torch.Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return model(input_ids=input_ids, labels=labels).loss

    def check() -> None:
        """Without dropout: the gradient of the word embeddings in chunk and attention form, and with sparse prediction."""
        expected = {}
        for name, model in models.items():
            if name != "BERT":
                for form in FORMS if length <= 128 else ("attention", "chunk"):
                    model.eval().config.attention_form = form
                    gradient = torch.autograd.grad(loss_of(run[name]), model.decoder.weight)[0]
                    first = expected.setdefault(name.split(",")[0], gradient.double())
                    _assert_close(gradient, first, 1e-3 if args.dtype == "float32" else 0.1, f"gradient of {name}, {form} form")
                model.train().config.attention_form = "auto"

    def step(model, optimizer) -> None:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    functions = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        functions[name] = partial(step, run[name], optimizer)
    return Group("masked-LM training", length, f"step, {batch} x {length}", functions, "BERT", check)


def memory_suite(args: argparse.Namespace) -> Iterator:
    """Peak above the weights of a forward pass of text encoders of base size, each in a process of its own."""
    for length in (args.lengths or MEMORY_LENGTHS)[-1 if args.quick else 0 :]:
        names = [*FAMILIES, *(["BERT"] if length <= LONGEST_PEER[args.device] else [])]
        yield partial(memory_row, args, "memory", "forward, one row", peak_of_model, names, length)


def training_memory_suite(args: argparse.Namespace) -> Iterator:
    """Peak above the weights of a masked-LM forward and backward pass, 30 % labelled, gradients of the weights included."""
    names = ["LION-S", "LION-S, sparse prediction", "LION-S, sparse prediction, checkpointing", "BERT"]
    for length in (args.lengths or TRAINING_MEMORY_LENGTHS)[-1 if args.quick else 0 :]:
        yield partial(memory_row, args, "memory of training", "forward + backward, one row", peak_of_training, names, length)


def memory_row(args, suite: str, what: str, peak, names: list[str], length: int) -> Row:
    values = {}
    for name in names[:: len(names) - 1] if args.quick else names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            values[name] = pool.apply(peak, (args, name, length))
    return Row(suite, length, what, None, values)


def peak_of_model(args, name: str, length: int) -> float:
    """MiB above the weights and inputs."""
    size = sizes(args) | {"max_position_embeddings": length}
    if name == "BERT":
        model = BertModel(BertConfig(attn_implementation="sdpa", **size))
    else:
        model = LionModel(LionConfig(mask_type=FAMILIES[name], **size))
    model = model.to(args.device, getattr(torch, args.dtype)).eval()
    model = torch.compile(model) if args.compile else model
    input_ids = torch.randint(1000, WORDS, (1, length), device=args.device)
    with torch.no_grad():
        model(input_ids[:, :256])  # libraries take what they need once
        return peak_memory(lambda: model(input_ids).last_hidden_state, args.device)


def peak_of_training(args, name: str, length: int) -> float:
    """MiB above the weights and inputs, without dropout of scores."""
    size = sizes(args) | {"max_position_embeddings": length, "attention_probs_dropout_prob": 0.0}
    if name == "BERT":
        model = BertForMaskedLM(BertConfig(attn_implementation="sdpa", **size))
    else:
        model = LionForMaskedLM(LionConfig(sparse_prediction="sparse" in name, **size))
    model = model.to(args.device, getattr(torch, args.dtype)).train()
    if "checkpointing" in name:
        model.gradient_checkpointing_enable()
    input_ids = torch.randint(1000, WORDS, (1, length), device=args.device)
    labels = torch.where(torch.rand(1, length, device=args.device) < 0.3, input_ids, -100)
    model(input_ids=input_ids[:, :64], labels=labels[:, :64])  # libraries take what they need once
    return peak_memory(lambda: model(input_ids=input_ids, labels=labels).loss.backward(), args.device)


def chunks_suite(args: argparse.Namespace) -> Iterator:
    """Forms and chunk sizes of LION-S beside each other: the source of `choose_form` and `CHUNK_SIZES`."""
    for what in ("forward", "forward + backward"):
        for length in args.lengths or (16, 32, 64, 128, 197, 256, 512, 1024, 4096):
            for batch in (1, 16) if length <= 64 else (1,):
                yield partial(chunks_group, args, length, batch, what)


def chunks_group(args, length: int, batch: int, what: str) -> Group:
    training = what != "forward"
    query, key, value = (_leaf(torch.randn(batch, length, HEADS, HEAD_DIM), args, training).transpose(1, 2) for _ in range(3))
    log_decay = _leaf(F.logsigmoid(torch.randn(batch, HEADS, length) + 3), args, training, torch.float32)
    call = partial(lion_attention, query, key, value, log_decay)
    calls = {"auto": call}
    if length <= 1024:
        calls["attention"] = partial(call, form="attention")
        calls["one chunk"] = partial(call, form="chunk", chunk_size=length)
    for size in (32, 64, 128, 256, 512):
        if size < length:
            calls[f"chunks of {size}"] = partial(call, form="chunk", chunk_size=size)
    grad = torch.randn(batch, length, HEADS, HEAD_DIM, device=args.device, dtype=query.dtype).transpose(1, 2)
    check = partial(_assert_agree, calls, "auto", (query, key, value, log_decay), grad, training)
    what += f" of {batch} row{'s' * (batch > 1)}"
    return Group("forms and chunk sizes", length, what, _timed(calls, grad, training), "auto", check)


def forms_suite(args: argparse.Namespace) -> Iterator:
    """The three forms of LION-lit and LION-S beside each other, one row: where they cross."""
    for what in ("forward", "forward + backward"):
        for name in ("LION-lit", "LION-S"):
            for length in args.lengths or (16, 32, 64, 128, 256, 512, 1024, 2048):
                yield partial(forms_group, args, name, length, what)


def forms_group(args, name: str, length: int, what: str) -> Group:
    training = what != "forward"
    query, key, value = (_leaf(torch.randn(1, length, HEADS, HEAD_DIM), args, training).transpose(1, 2) for _ in range(3))
    log_decay = None
    if name == "LION-S":
        log_decay = _leaf(F.logsigmoid(torch.randn(1, HEADS, length) + 3), args, training, torch.float32)
    calls = {form: partial(lion_attention, query, key, value, log_decay, form=form) for form in FORMS}
    grad = torch.randn(1, length, HEADS, HEAD_DIM, device=args.device, dtype=query.dtype).transpose(1, 2)
    check = partial(_assert_agree, calls, "recurrent", (query, key, value, log_decay), grad, training)
    return Group("forms", length, f"{name} {what}", _timed(calls, grad, training), "chunk", check)


def sizes(args) -> dict[str, int]:
    """Base size, as BERT's and ViT's; with --quick a small one."""
    width, depth, heads = (64, 2, 4) if args.quick else (768, 12, 12)
    return {
        "vocab_size": WORDS,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


def _rows_of(args, cpu: dict[int, int], cuda: dict[int, int]) -> dict[int, int]:
    rows = cpu if args.device == "cpu" else cuda
    return {length: rows.get(length, 1) for length in args.lengths or rows}


def _leaf(x: torch.Tensor, args, requires_grad: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.to(args.device, dtype or getattr(torch, args.dtype)).requires_grad_(requires_grad)


def _timed(calls: dict, grad: torch.Tensor, training: bool) -> dict:
    """What is timed of operations: the forward pass without gradients, or both passes."""
    if not training:
        return {name: torch.no_grad()(call) for name, call in calls.items()}
    return {name: lambda call=call: call().backward(grad) for name, call in calls.items()}


def _results(function, inputs, grad: torch.Tensor, training: bool) -> list[torch.Tensor]:
    """The output, and if training the gradient of every input."""
    output = function()
    if not training:
        return [output.detach()]
    return [output.detach(), *torch.autograd.grad(output, [x for x in inputs if x is not None], grad)]


def _assert_agree(calls: dict, reference: str, inputs, grad: torch.Tensor, training: bool) -> None:
    """Raises AssertionError unless all calls give what the one named `reference` gives."""
    results = {name: _results(function, inputs, grad, training) for name, function in calls.items()}
    for name, found in results.items():
        for x, y in zip(found, results[reference]):
            _assert_close(x, y.double(), TOLERANCE[grad.dtype], f"{name} beside {reference}, {grad.shape[2]} tokens")


def _assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str, largest: float = 0) -> None:
    """Raises AssertionError unless the largest error is at most `tolerance` times the largest entry, or `largest`."""
    error, largest = (found.double() - expected).abs().max().item(), max(expected.abs().max().item(), largest)
    if not error <= tolerance * largest:
        raise AssertionError(f"{what}: error {error:.2g} of entries up to {largest:.2g}; nothing was timed")


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
