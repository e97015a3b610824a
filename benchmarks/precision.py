"""Rounding errors of the operation and of whole models, against the definition in float64.

    python benchmarks/precision.py                  # 4 minutes on one CPU core
    python benchmarks/precision.py --device cuda    # with the fused kernels beside the torch
    backend python benchmarks/precision.py --quick          # short rows, to see that everything
    runs

An error is |x - x64| over the largest |x64| of the same tensor (one family and kind of gates, one
head of 16 numbers), or over the largest contribution of a token to itself, where sums cancel to
less than that: with gates of 0 and a divisor the gradients of query and key vanish. The tables show
the largest error and the mean over a tensor. Gradients are those of a random weighting of the
output. Query, key and value are random numbers that bfloat16 and float16 hold exactly, so the
errors are those of computing and of rounding results, not of rounding inputs; where the operation
normalises, query and key are positive. Log-decays are float32, as models pass them.

Of whole models (12 layers of width 192) the weights are rounded too, unless it is autocast: the
difference of logits, and of the gradient of all parameters as one vector, in the Euclidean norm
over that of float64.

Leaves precision-DEVICE.json, .md and .png in benchmarks/results, with --quick in
outputs/benchmarks.
"""

import argparse
import copy
import itertools
import json
import sys
from pathlib import Path

import torch
from measure import environment
from precision_report import DTYPES, TENSORS, plot, table
from torch.nn import functional as F
from tqdm import tqdm

from lion_hf import LionConfig, LionForImageClassification, LionForMaskedLM, lion_attention
from lion_hf.modeling.lion_naive import recurrent

LENGTHS = (128, 1024, 8192, 65_536)
# Longest rows: scores are quadratic in memory, and autograd keeps the recurrent form's state of
# every token. Forward, with gradients.
LONGEST = {
    "attention": (2048, 2048),
    "chunk": (10**9, 10**9),
    "recurrent": (10**9, 1024),
}
ATTENTION_LENGTHS = (128, 1024, 2048)
# Of the torch recurrent form on a GPU, where every token costs ten launches.
LONGEST_IN_STEPS = 8192
HEAD_DIM = 16


def gates(length: int) -> dict[str, torch.Tensor]:
    """Kinds of gates, (length) each: both ends, what lies near them, and all of it mixed."""
    random = torch.sigmoid(torch.randn(length) * 2 + 1)
    ends = torch.randint(0, 3, (length,))
    return {
        "random": random,
        "near 0": 10 ** -(3 + 3 * torch.rand(length)),
        "near 1": 1 - 10 ** -(3 + 3 * torch.rand(length)),
        "0": torch.zeros(length),
        "1": torch.ones(length),
        "mixed": torch.where(ends == 0, 0, torch.where(ends == 1, 1, random)),
    }


class Problem:
    """Inputs of one length, and what the definition makes of them in float64.

    Results are by family and kind of gates.

    Every case is one head: LION-lit, LION-D with one gate for all tokens, and LION-S with a gate
    for each.
    """

    def __init__(self, length: int, normalize: bool):
        self.length, self.normalize = length, normalize
        kinds = gates(length)
        self.cases = [("lit", "none"), *(("decay", kind) for kind in kinds if kind != "mixed")]
        self.cases += [("selective", kind) for kind in kinds]
        kinds["none"] = kinds["1"]
        rows = [
            kinds[kind][:1].expand(length) if family == "decay" else kinds[kind]
            for family, kind in self.cases
        ]
        edges = torch.stack(rows)[None].log()  # (1, cases, length)
        self.inputs = [*(self._draw(i < 2) for i in range(3)), edges, edges.roll(-1, -1)]
        self.weight = self._draw(False)
        self.expected, self.own = exact(
            *(x.double() for x in (*self.inputs, self.weight)), normalize
        )

    def _draw(self, feature: bool) -> torch.Tensor:
        x = torch.randn(1, len(self.cases), self.length, HEAD_DIM)
        x = x.abs() + 0.1 if feature and self.normalize else x
        x = x.bfloat16().float()
        return torch.where(x.abs() < 2**-14, 0, x)  # below, float16 loses digits

    def heads(self, family: str) -> list[int]:
        return [n for n, case in enumerate(self.cases) if case[0] == family]


def exact(
    query, key, value, ltr, rtl, weight, normalize: bool, eps: float = 1e-6
) -> tuple[dict, dict]:
    """Output and gradients of `(output * weight).sum()` by the recurrent definition.

    It takes O(L) time and no autograd.

    Also returns, for each of them, what every token contributes to its own entry.

    With P_ij = M_ij (q_i . k_j) (g_i . v_j), all gradients are the operation itself on other
    tensors: that of the queries has g, v, k in the places of query, key, value; those of keys and
    values go the other way along every edge. The gradient of the log-decay on an edge is the sum of
    P over all pairs that it joins: rows behind it less columns behind it.
    """
    scale = query.shape[-1] ** -0.5
    closed = torch.full_like(ltr, -800.0)
    edges = ltr.clamp(min=-800), rtl.clamp(min=-800)
    left_only, right_only = (edges[0], closed), (closed, edges[1])
    value = F.pad(value, (0, 1), value=1.0) if normalize else value

    def both(q, k, v, left, right) -> torch.Tensor:
        """(2, H, L, Dv): what comes along the edges of either direction, the diagonal in both."""
        return recurrent(
            *(x.expand(2, -1, -1, -1) for x in (q, k, v)), torch.cat(left), torch.cat(right), scale
        )

    score = (query * key).sum(-1, keepdim=True) * scale
    diagonal = score * value
    parts = both(query, key, value, *zip(left_only, right_only))
    total = parts.sum(0, keepdim=True) - diagonal
    if normalize:
        divisor = total[..., -1:] + eps
        output, divided = total[..., :-1] / divisor, weight / divisor
        grad = torch.cat([divided, -(divided * output).sum(-1, keepdim=True)], dim=-1)
    else:
        output, grad = total, weight
    grad_query = recurrent(grad, value, key, *edges, scale)
    # against the edges: what was left to right now runs right to left
    grad_keys = both(value, grad, query, *zip((closed, edges[0]), (edges[1], closed)))
    grad_key = grad_keys.sum(0, keepdim=True) - (value * grad).sum(-1, keepdim=True) * scale * query
    grad_value = recurrent(key, query, grad, *edges[::-1], scale)
    # (2, H, L): sums of P over the sources, the targets
    rows, columns = (grad * parts).sum(-1), (key * grad_keys).sum(-1)
    # sums over all later places
    behind = F.pad((rows - columns).flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))
    size = weight.shape[-1]
    grads = (grad_query, grad_key, grad_value[..., :size], behind[:1], -behind[1:])
    pull = (grad * value)[..., :size].sum(-1, keepdim=True)
    own_edge = (score * pull)[..., 0]
    own = (
        diagonal[..., :size],
        pull * scale * key,
        pull * scale * query,
        score * grad[..., :size],
        own_edge,
        own_edge,
    )
    return dict(zip(("output", *TENSORS), (output, *grads))), dict(zip(("output", *TENSORS), own))


def check_exact() -> None:
    """Checks `exact` against autograd through the attention form in float64.

    Also checks that a wrong gate would show.
    """
    for normalize in (False, True):
        problem = Problem(61, normalize)
        inputs = [x.double().clamp(min=-800).requires_grad_() for x in problem.inputs]
        output = lion_attention(
            *inputs[:3], tuple(inputs[3:]), normalize=normalize, form="attention"
        )
        found = dict(
            zip(TENSORS, torch.autograd.grad((output * problem.weight).sum(), inputs)),
            output=output,
        )
        for name, expected in problem.expected.items():
            assert (found[name] - expected).abs().max() <= 1e-11 * expected.abs().max(), name


def operation_rows(
    problem: Problem, form: str, backend: str, dtype: str, device: str
) -> list[dict]:
    """Errors of one form and type: a row for every family and kind of gates."""
    about = {"form": form, "backend": backend, "dtype": dtype}
    about |= {"length": problem.length, "normalize": problem.normalize}
    rows = []
    for family in ("lit", "decay", "selective"):
        found = _results_of_family(problem, family, about, device)
        for place, head in enumerate(problem.heads(family)):
            errors = {}
            for name, x in found.items():
                expected = problem.expected[name][0, head]
                if family == "decay" and name == "left_to_right":
                    # one gate: that of all edges in both directions
                    expected = expected + problem.expected["right_to_left"][0, head]
                    expected = expected.sum(-1, keepdim=True)
                own = problem.own[name][0, head]
                errors[name] = relative_error(x[0, place].cpu().double(), expected, own)
            gates = problem.cases[head][1]
            rows.append({"family": family, "gates": gates, **about, "errors": errors})
    return rows


def _results_of_family(
    problem: Problem, family: str, about: dict, device: str
) -> dict[str, torch.Tensor]:
    """The output of a family's heads and, where rows are not too long for it, every gradient."""
    form, backend, dtype = about["form"], about["backend"], DTYPES[about["dtype"]]
    training = problem.length <= LONGEST[form][1]
    if form == "recurrent" and backend == "triton":
        training = False  # the kernels have no backward pass of this form
    heads = problem.heads(family)
    *operands, ltr, rtl, weight = (
        x[:, heads].to(device) for x in (*problem.inputs, problem.weight)
    )
    operands = [x.to(dtype).requires_grad_(training) for x in operands]
    ltr = ltr[..., :1] if family == "decay" else ltr
    edges = [x.clone().requires_grad_(training) for x in (ltr, rtl)]
    edges = edges[: {"lit": 0, "decay": 1, "selective": 2}[family]]
    log_decay = tuple(edges) if len(edges) == 2 else edges[0] if edges else None
    options = {"normalize": problem.normalize, "form": form, "backend": backend}
    output = lion_attention(*operands, log_decay, **options)
    found = {"output": output.detach()}
    if training:
        grads = torch.autograd.grad(output, [*operands, *edges], weight.to(dtype))
        found |= dict(zip(TENSORS, grads))
    return found


def relative_error(
    found: torch.Tensor, expected: torch.Tensor, own: torch.Tensor
) -> tuple[float, float]:
    """Largest and mean |found - expected| over the largest |expected| or |own|."""
    error = (found - expected).abs() / max(expected.abs().max().item(), own.abs().max().item())
    return error.max().item(), error.mean().item()


# Name -> type of the weights, type of the gates' weights, type of autocast.
MODES = {
    "float32": ("float32", "float32", None),
    "autocast bfloat16": ("float32", "float32", "bfloat16"),
    "autocast float16": ("float32", "float32", "float16"),
    "loaded in bfloat16": ("bfloat16", "float32", None),
    "loaded in float16": ("float16", "float32", None),
    ".to(bfloat16)": ("bfloat16", "bfloat16", None),
    ".to(float16)": ("float16", "float16", None),
}


def model_rows(modality: str, family: str, order: str, quick: bool, device: str) -> list[dict]:
    """Errors of an untrained model's logits and gradients in every mode."""
    size = {
        "hidden_size": 192,
        "num_hidden_layers": 2 if quick else 12,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    }
    torch.manual_seed(0)
    if modality == "text":
        config = LionConfig(mask_type=family, vocab_size=1000, **size)
        model, length = LionForMaskedLM(config), 64 if quick else 512
        inputs = {
            "input_ids": torch.randint(5, 1000, (1, length)),
            "labels": torch.randint(5, 1000, (1, length)),
        }
    else:
        side = 64 if quick else 224
        config = LionConfig(
            modality="image",
            mask_type=family,
            patch_order=order,
            image_size=side,
            num_labels=10,
            **size,
        )
        model = LionForImageClassification(config)
        inputs = {"pixel_values": torch.randn(1, 3, side, side), "labels": torch.tensor([1])}
    model = model.eval().to(device)  # without dropout
    inputs = {name: x.to(device) for name, x in inputs.items()}
    expected = results(copy.deepcopy(model).double(), inputs, torch.float64)
    rows = []
    for mode, (weights, gate, autocast) in MODES.items():
        half = copy.deepcopy(model).to(DTYPES[weights])
        for name, module in half.named_modules():
            if name.endswith(".gate"):
                module.to(DTYPES[gate])
        found = results(half, inputs, DTYPES[weights], autocast and DTYPES[autocast])
        errors = {
            name: ((x - y).norm() / y.norm()).item()
            for (name, x), y in zip(found.items(), expected.values())
        }
        family_name = family + (", snake" if order == "snake" else "")
        rows.append({"modality": modality, "family": family_name, "mode": mode, "errors": errors})
    return rows


def results(
    model, inputs: dict, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Logits, loss and the gradient of all parameters in float64.

    The loss is scaled by 1,024, as GradScaler does.
    """
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        outputs, scale = model(**inputs), 1024.0
    (outputs.loss * scale).backward()
    gradient = (
        torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
        / scale
    )
    found = {
        "logits": outputs.logits.detach().double(),
        "loss": outputs.loss.detach().double(),
        "gradient": gradient,
    }
    for name, x in found.items():
        if not torch.isfinite(x).all():
            raise AssertionError(f"{name} of {type(model).__name__} is not finite")
    return found


def _lengths(quick: bool) -> list[int]:
    return [64, 300] if quick else sorted({*LENGTHS, *ATTENTION_LENGTHS})


def _rows_of_length(length: int, args: argparse.Namespace) -> list[dict]:
    """Errors of the operation at one length, for all forms, types and backends."""
    backends = ("torch", "triton") if args.device == "cuda" else ("torch",)
    measured = {form: ATTENTION_LENGTHS if form == "attention" else LENGTHS for form in LONGEST}
    forms = [form for form in LONGEST if args.quick or length in measured[form]]
    cases = list(itertools.product(DTYPES, forms, backends))
    if len(backends) > 1 and length > LONGEST_IN_STEPS:
        cases = [case for case in cases if case[1:] != ("recurrent", "torch")]
    rows = []
    for normalize in (False, True):
        problem = Problem(length, normalize)
        for dtype, form, backend in cases:
            rows += operation_rows(problem, form, backend, dtype, args.device)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="two short lengths, shallow models")
    parser.add_argument("--output", type=Path, help="folder of the reports")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device here; use --device cpu")
    folder = args.output or Path("outputs/benchmarks" if args.quick else "benchmarks/results")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        sys.exit(f"--output {folder}: this path is or goes through a file; give a folder")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    check_exact()

    rows, models = [], []
    for length in tqdm(_lengths(args.quick), desc="operation", unit="length"):
        rows += _rows_of_length(length, args)
    if not all(
        e == e and e < float("inf") for r in rows for pair in r["errors"].values() for e in pair
    ):
        raise AssertionError("a result is not finite")
    cases = [("text", f, "raster") for f in ("lit", "decay", "selective")]
    cases += [("image", f, "raster") for f in ("lit", "decay", "selective")]
    cases += [("image", f, "snake") for f in ("decay", "selective")]
    for case in tqdm(cases, desc="models", unit="model"):
        models += model_rows(*case, args.quick, args.device)

    tensors = sum(len(r["errors"]) for r in rows) + 3 * len(models)
    about = environment(args.device, "float32, bfloat16 and float16")
    report = {
        "about": about,
        "finite": f"All {tensors:,} tensors are finite",
        "operation": rows,
        "models": models,
    }
    name = f"precision-{args.device}"
    text = table(report)
    (folder / f"{name}.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    plot(folder / f"{name}.png", report)
    print(text)


if __name__ == "__main__":
    main()
