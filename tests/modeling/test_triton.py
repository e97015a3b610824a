"""The fused kernels against the definition.

In triton's interpreter at small sizes, and with `-m gpu` on a GPU at real ones.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.marks import slow_except
from support.oracle import FEATURES, MASK_TYPES, check, gradients, make_problem, mask_of
from torch.nn import functional as F

import lion_hf
from lion_hf import lion_attention
from lion_hf.modeling import lion_ops
from lion_hf.modeling.configuration_lion import FORMS

lion_triton = pytest.importorskip("lion_hf.modeling.lion_triton")
lion_triton_launch = pytest.importorskip("lion_hf.modeling.lion_triton_launch")
# Four units in the last place of the largest entry, twice what the torch forms keep to: they
# compute in float32, but what the kernels multiply is rounded to the type.
HALF = [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)]
# padding, packed, ordered, normalized, features: every option with every other
OPTIONS = [
    ("none", False, False, False, "identity"),
    ("left", False, True, True, "normalized_silu"),
    ("right", True, True, False, "identity"),
    ("interior", True, False, True, "elu_plus_one"),
    ("right", True, True, True, "exponential"),
    ("left", False, False, True, "sqrt_softmax"),
]


def fused(*args, **kwargs):
    return lion_attention(*args, **kwargs, backend="triton")


@pytest.fixture
def device(device):
    """Where there is a GPU the kernels are compiled for it, and the CPU is not for them."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    return device


@pytest.fixture(autouse=True)
def _round_to_nearest(monkeypatch):
    """The interpreter cuts float32 off to bfloat16; a GPU rounds to nearest."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    cut_off = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, dst_type):
        if (source.dtype.scalar.name, dst_type.scalar.name) != ("fp32", "bf16"):
            return cut_off(self, source, dst_type)
        rounded = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16, so that short rows have several, and blocks and chunks end apart."""
    small = lion_triton_launch.Blocks(16, 16, 16, 4, 1)
    blocks = {(size, lion_triton_launch.LARGEST_HEAD): small for size in (2, 4)}
    for kernel in lion_triton_launch.BLOCKS:
        monkeypatch.setitem(lion_triton_launch.BLOCKS, kernel, blocks)


@pytest.mark.parametrize("padding, packed, ordered, normalize, feature_map", OPTIONS)
@pytest.mark.parametrize("form, chunk_size", [("attention", None), ("chunk", 20)])
@pytest.mark.parametrize("mask_type", slow_except(MASK_TYPES, "selective"))
def test_options(
    mask_type,
    form,
    chunk_size,
    padding,
    packed,
    ordered,
    normalize,
    feature_map,
    device,
    small_blocks,
):
    """Output and every gradient.

    The chunk form runs two orders one by one, the attention form from one score matrix.
    """
    options = {"batch": 2, "heads": 1, "feature_map": feature_map, "device": device}
    problem = make_problem(mask_type, 37, padding, packed, ordered, normalize, **options)
    check(problem, fused, torch.float32, 1e-4, form=form, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", (None, 16, 63, 128), ids=lambda x: f"chunks of {x}")
@pytest.mark.parametrize("length", slow_except((1, 2, 17, 63, 64, 65, 130), 1, 17, 65))
def test_lengths(length, chunk_size, device):
    """The blocks of the table, alone and beside a rest of one token."""
    problem = make_problem(
        "selective", length, "interior", True, False, True, batch=1, heads=2, device=device
    )
    check(problem, fused, torch.float32, 1e-4, form="chunk", chunk_size=chunk_size)


@pytest.mark.parametrize("dtype, tolerance", HALF, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "form, chunk_size", [("attention", None), ("chunk", 16), ("chunk orders", None)]
)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_half_precision(mask_type, form, chunk_size, dtype, tolerance, device):
    form, *orders = form.split()
    features = "identity" if mask_type == "lit" else "normalized_silu"
    options = {"batch": 1, "heads": 2, "feature_map": features, "dtype": dtype, "device": device}
    problem = make_problem(mask_type, 45, "interior", True, bool(orders), True, **options)
    check(problem, fused, dtype, tolerance, form=form, chunk_size=chunk_size)


@pytest.mark.parametrize(
    "head_dim, value_dim",
    slow_except([(1, 1), (5, 40), (33, 16), (80, 64), (130, 3), (256, 8)], (1, 1), (5, 40)),
)
def test_head_sizes(head_dim, value_dim, device):
    """Sizes that are no powers of two, several slices of a state, and values of another size."""
    problem = make_problem(
        "selective",
        20,
        "left",
        batch=1,
        heads=1,
        head_dim=head_dim,
        value_dim=value_dim,
        device=device,
    )
    check(problem, fused, torch.float32, 1e-4, form="chunk", chunk_size=9)


def test_the_divisor_beside_the_largest_values(device):
    """Orders longer than a chunk have the divisor as one more column of the values."""
    problem = make_problem(
        "selective",
        20,
        ordered=True,
        normalize=True,
        batch=1,
        heads=1,
        head_dim=5,
        value_dim=lion_triton_launch.LARGEST_HEAD,
        device=device,
    )
    check(problem, fused, torch.float32, 1e-4, form="chunk", chunk_size=16)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 4e-6), *HALF], ids=lambda x: str(x).removeprefix("torch.")
)
@pytest.mark.parametrize("name", ("elu_plus_one", "normalized_silu", "sqrt_softmax"))
def test_feature_maps(name, dtype, tolerance, device):
    """Features and gradients in any type.

    For odd heads, strides, and padding that holds anything.
    """
    for head_dim in (1, 5, 64, 256):
        x = torch.randn(2, 9, 3, head_dim, device=device).to(dtype).transpose(1, 2) * 4
        mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5], device=device) != 0
        x[1, :, 4:] = torch.tensor([float("nan"), float("inf")], device=device).to(dtype)[
            torch.randint(2, (5, head_dim))
        ]
        hidden = ~mask[:, None, :, None]
        exact = x.double().masked_fill(hidden, 0).requires_grad_()
        expected = FEATURES[name](exact).masked_fill(hidden, 0)
        found = lion_triton.fused_features(x.requires_grad_(), None, mask, name, dtype)
        weight = torch.randn_like(found)
        assert found.dtype == dtype
        dx, exact_dx = (
            torch.autograd.grad(found, x, weight)[0],
            torch.autograd.grad(expected, exact, weight.double())[0],
        )
        for y, z in ((found, expected), (dx, exact_dx)):
            assert (y.double() - z).abs().max() <= tolerance * max(z.abs().max().item(), 1)


@pytest.mark.parametrize("normalize, ordered", [(False, False), (True, True)])
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_recurrent_form(mask_type, normalize, ordered, device):
    options = {
        "heads": 1,
        "value_dim": 17,
        "feature_map": "elu_plus_one" if normalize else "identity",
        "device": device,
    }
    problem = make_problem(mask_type, 19, "interior", True, ordered, normalize, **options)
    inputs = {name: x.detach().float() for name, x in problem.inputs.items()}
    with torch.no_grad():
        output = fused(**inputs, **problem.options, form="recurrent")
    real = (problem.weight != 0).any(-1, keepdim=True).any(1, keepdim=True)
    torch.testing.assert_close(
        (output * real).double(), problem.expected["output"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("form", ("attention", "chunk", "recurrent"))
def test_strided_inputs(form, device):
    """Inputs of unusual strides.

    A slice of a packed projection, every second number of a longer head, one key for all heads, and
    a broadcast gradient.
    """
    packed = torch.randn(2, 21, 3, 3, 8, device=device)
    query, value = packed[:, :, 0].transpose(1, 2), packed[:, :, 2].transpose(1, 2)[..., ::2]
    key = torch.randn(2, 1, 21, 8, device=device).expand(-1, 3, -1, -1)
    gates = F.logsigmoid(torch.randn(2, 21, 3, device=device)).transpose(1, 2)
    results = []
    for inputs in (
        (query, key, value, gates),
        [x.contiguous() for x in (query, key, value, gates)],
    ):
        inputs = [x.detach().requires_grad_(form != "recurrent") for x in inputs]
        output = fused(*inputs, form=form, chunk_size=8)
        grads = torch.autograd.grad(output.sum(), inputs) if form != "recurrent" else []
        results.append([output, *grads])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        torch.testing.assert_close(
            output, lion_attention(*inputs, form="attention", backend="torch"), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "mask_type, ordered, normalize",
    [("lit", 0, 1), ("decay", 0, 0), ("selective", 0, 1), ("selective", 1, 1)],
)
def test_dropout(mask_type, ordered, normalize, device, small_blocks):
    """Forward and backward drop the same scores, and as many as they should.

    They drop others in every head, row and call.
    """
    problem = make_problem(
        mask_type, 20, "interior", False, bool(ordered), bool(normalize), heads=2, device=device
    )
    ones, places = (
        torch.ones(2, 2, 20, 1, device=device),
        torch.eye(20, device=device).expand(2, 2, -1, -1),
    )
    torch.manual_seed(3)
    kept = fused(ones, ones, places, scale=1.0, dropout_p=0.25).double()  # score by score
    assert ((kept == 0) | (kept == kept.max())).all()
    assert kept.max().item() == pytest.approx(1 / 0.75)
    assert (
        abs((kept == 0).double().mean() - 0.25) < 0.055
    )  # five standard deviations of a share of 1,600 scores
    again = fused(ones, ones, places, scale=1.0, dropout_p=0.25)
    for other in (kept[0, 1], kept[1, 0], again[0, 0]):
        assert (
            (kept[0, 0] == 0) != (other == 0)
        ).double().mean() > 0.25  # of independent ones 0.375

    weights = lion_attention(**problem.inputs, **problem.options, need_weights=True)[1]
    problem.expected = gradients(
        (weights * kept) @ problem.inputs["value"], problem, problem.inputs
    )
    torch.manual_seed(3)
    check(problem, fused, torch.float32, 1e-4, dropout_p=0.25)


@pytest.mark.parametrize("form", ("attention", "chunk"))
def test_extreme_gates(form, device, small_blocks):
    """Gates of 0 and 1 and between them: finite values and gradients, equal to the definition."""
    gates = torch.tensor([0.0, 1e-30, 1e-7, 0.9, 1.0])[torch.randint(5, (1, 2, 50))]
    inputs = [
        x.to(device).requires_grad_()
        for x in (*(torch.randn(1, 2, 50, 4) for _ in range(3)), gates.log())
    ]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = fused(*inputs, form=form, chunk_size=20, scale=1.0)
    expected = (mask_of(exact[3].exp()[0]) * (exact[0] @ exact[1].mT)) @ exact[2]
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    for x, y in zip(
        torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(expected.sum(), exact)
    ):
        assert torch.isfinite(x).all()
        assert (x.double() - y).abs().max() <= 1e-4 * y.abs().max()


@pytest.mark.parametrize("ordered", (False, True), ids=lambda x: "orders" if x else "raster")
@pytest.mark.parametrize("chunk_size", (20, 50))
def test_gradients_of_small_gates(chunk_size, ordered, device, small_blocks):
    """Gates near 0 have small gradients.

    The tokens' parts, in themselves a million times as large, must not spoil them.
    """
    inputs = [torch.randn(1, 1, 50, 4, device=device) for _ in range(3)]
    order = torch.stack([torch.arange(50), torch.randperm(50)]).to(device) if ordered else None
    gates = (10 ** -(5 + torch.rand((2,) * ordered + (1, 1, 50), device=device))).log()
    weight, found = torch.randn(1, 1, 50, 4, device=device), []
    for dtype, options in ((torch.float32, {"backend": "triton"}), (torch.float64, {})):
        leaf, tensors = gates.to(dtype).requires_grad_(), [x.to(dtype) for x in inputs]
        output = lion_attention(
            *tensors, leaf, order=order, form="chunk", chunk_size=chunk_size, **options
        )
        found.append(torch.autograd.grad(output, leaf, weight.to(dtype))[0])
    assert 0 < found[1].abs().max() < 1e-3
    assert (found[0].double() - found[1]).abs().max() < 1e-5 * found[1].abs().max()


@pytest.mark.slow
def test_small_gates_do_not_spoil_the_large_ones_behind_them(device):
    """Sums of two numbers keep what one would lose.

    After a thousand gates of 1e-30, one float32 number alone would round a gate of 0.999 away.
    """
    query, key, value = (torch.ones(1, 1, 1100, 1, device=device) for _ in range(3))
    gates = torch.cat([torch.full((1000,), 1e-30), torch.full((100,), 0.999)])
    expected = mask_of(gates.double()[None])[0].sum(-1)
    for chunk_size in (1100, 256):
        output = fused(
            query,
            key,
            value,
            gates.log()[None, None].to(device),
            scale=1.0,
            form="chunk",
            chunk_size=chunk_size,
        )
        torch.testing.assert_close(output[0, 0, :, 0].double().cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "strided, dtype", [(False, torch.long), (True, torch.long), (False, torch.int32)]
)
def test_one_order(strided, dtype, device, small_blocks):
    """A single permutation is not the tokens as they stand.

    Nothing stacks it: it has any strides and integers.
    """
    problem = make_problem(
        "selective", 37, "left", False, True, True, batch=1, heads=2, device=device
    )
    order = problem.options["order"].to(dtype)
    problem.options["order"] = (order.T.contiguous().T if strided else order)[:1]
    assert problem.options["order"].stride(1) == 1 + strided
    gates = problem.inputs["log_decay"][:1].detach()
    inputs = {**problem.inputs, "log_decay": gates}
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    expected = gradients(
        lion_attention(**inputs, **problem.options, backend="torch"), problem, inputs
    )
    for form, chunk_size in (("attention", None), ("chunk", 16)):
        halves = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
        found = gradients(
            fused(**halves, **problem.options, form=form, chunk_size=chunk_size), problem, halves
        )
        for name, x in expected.items():
            torch.testing.assert_close(found[name].double(), x, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
def test_padding_may_hold_anything(device):
    """NaN and infinity in masked places stay there, and the output there is 0."""
    query, key, value = (torch.rand(2, 3, 12, 4, device=device) for _ in range(3))
    mask = torch.ones(2, 12, dtype=torch.bool, device=device)
    mask[:, 4] = False
    query[:, :, 4], key[:, :, 4], value[:, :, 4] = float("nan"), float("nan"), float("inf")
    for form, chunk_size in (("attention", None), ("chunk", 5)):
        for log_decay in (None, torch.full((1, 3, 1), -0.1, device=device)):
            inputs = [x.clone().requires_grad_() for x in (query, key, value)]
            options = {
                "attention_mask": mask,
                "normalize": True,
                "form": form,
                "chunk_size": chunk_size,
            }
            output = fused(*inputs, log_decay, **options)
            output.sum().backward()
            assert all(torch.isfinite(x).all() for x in (output, *(x.grad for x in inputs)))
            assert (output[:, :, 4] == 0).all()
            assert all((x.grad[:, :, 4] == 0).all() for x in inputs)


@pytest.mark.parametrize("form", ("attention", "chunk", "recurrent"))
def test_float16_saturates(form, device):
    """Also where a state leaves the range of float16.

    That is with 2,000 tokens of 64, of which the second chunk reads 64,000.
    """
    ones = torch.ones(1, 1, 100, 16, dtype=torch.float16, device=device)
    with torch.no_grad():
        output = fused(
            ones,
            50 * ones,
            50 * ones,
            torch.zeros(1, 1, 1, device=device),
            scale=1.0,
            form=form,
            chunk_size=40,
        )
        mean = fused(
            ones,
            ones,
            600 * ones,
            torch.zeros(1, 1, 1, device=device),
            normalize=True,
            form=form,
            chunk_size=40,
        )
    assert (output == torch.finfo(torch.float16).max).all()
    torch.testing.assert_close(mean, 600 * ones)  # states of 60,000


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)], ids=str)
def test_empty_inputs(shape, device):
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    gates = torch.zeros(1, shape[1], 1, device=device, requires_grad=True)
    for form in ("attention", "chunk"):
        output = fused(*inputs, gates, form=form, normalize=True)
        output.sum().backward()
        assert output.shape == shape
        assert all(x.grad is not None for x in (*inputs, gates))
    with torch.no_grad():
        assert fused(*inputs, gates, form="recurrent").shape == shape


def test_edges_of_the_two_directions(device):
    """A pair of edge decays, whose last entries belong to no edge.

    These are not read and their gradients are 0.
    """
    query, key, value = (torch.randn(1, 2, 30, 4, device=device) for _ in range(3))
    edges = [F.logsigmoid(torch.randn(1, 2, 30, device=device)).requires_grad_() for _ in range(2)]
    for chunk_size in (30, 8):
        expected = torch.autograd.grad(
            lion_attention(query, key, value, tuple(edges), backend="torch").sum(), edges
        )
        found = torch.autograd.grad(
            fused(query, key, value, tuple(edges), form="chunk", chunk_size=chunk_size).sum(), edges
        )
        for x, y in zip(found, expected):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
            assert (x[..., -1] == 0).all()


@pytest.mark.slow
def test_equal_inputs_give_equal_gradients(device):
    """Nothing is added up in an order that changes."""
    inputs = [torch.randn(2, 3, 40, 4, device=device, requires_grad=True) for _ in range(3)]
    inputs.append(F.logsigmoid(torch.randn(1, 3, 1, device=device)).requires_grad_())
    runs = [
        torch.autograd.grad(fused(*inputs, form="chunk", chunk_size=16).square().sum(), inputs)
        for _ in range(2)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs))


@pytest.mark.parametrize("padding, packed, ordered, normalize, feature_map", OPTIONS)
@pytest.mark.parametrize("form, chunk_size", [("attention", None), ("chunk", 8)])
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_second_derivatives(
    mask_type, form, chunk_size, padding, packed, ordered, normalize, feature_map, device
):
    """The kernels' gradients can be differentiated: then they are those of the torch chunk form."""
    options = {"batch": 1, "heads": 1, "feature_map": feature_map, "device": device}
    problem = make_problem(mask_type, 19, padding, packed, ordered, normalize, **options)
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in problem.inputs.items()}
        options = {"form": form, "chunk_size": chunk_size, "backend": backend}
        loss = (lion_attention(**inputs, **problem.options, **options) * problem.weight).sum()
        grads = torch.autograd.grad(loss, list(inputs.values()), create_graph=True)
        product = sum((g * g).sum() for g in grads)
        results.append([*grads, *torch.autograd.grad(product, list(inputs.values()))])
    for x, y in zip(*results):
        assert (x.double() - y).abs().max() <= 1e-3 * max(y.abs().max().item(), 1.0)


def test_second_derivatives_with_dropout_say_what_to_do(device):
    query = torch.rand(1, 1, 5, 4, device=device, requires_grad=True)
    output = fused(query, query, query, dropout_p=0.2)
    with pytest.raises(NotImplementedError, match="dropout_p=0 .*or backend='torch'"):
        torch.autograd.grad(output.sum(), query, create_graph=True)


def test_forward_mode_is_left_to_torch(device):
    query = torch.rand(1, 1, 5, 4, device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, query)
        with pytest.raises(
            ValueError, match="backend='triton': the kernels are not plain operations"
        ):
            fused(dual, query, query)
        assert (
            torch.autograd.forward_ad.unpack_dual(lion_attention(dual, query, query)).tangent
            is not None
        )


def test_autocast_and_mixed_types(device):
    """Products are in the type of the values.

    Also where queries and keys come in float32, as under autocast.
    """
    query, key, value = (torch.randn(2, 3, 20, 4, device=device).bfloat16() for _ in range(3))
    gates = F.logsigmoid(torch.randn(2, 3, 20, device=device))
    plain = fused(query, key, value, gates, form="chunk", chunk_size=8)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = fused(query.float(), key.float(), value, gates, form="chunk", chunk_size=8)
    assert plain.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(plain, mixed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, normalize, dropout_p", [("chunk", False, 0.0), ("attention", True, 0.25)]
)
def test_compile_without_graph_breaks(form, normalize, dropout_p, device):
    inputs = [torch.rand(2, 3, 9, 4, device=device, requires_grad=True) for _ in range(3)]
    inputs.append(F.logsigmoid(torch.randn(2, 3, 9, device=device)).requires_grad_())
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4], device=device)

    def function(*inputs):
        options = {"attention_mask": mask, "normalize": normalize, "form": form, "chunk_size": 4}
        return fused(*inputs, **options, dropout_p=dropout_p)

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)  # of what is dropped
        results.append(torch.autograd.grad(run(*inputs).square().sum(), inputs))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y)


def test_operators_keep_their_contract(device):
    """Fake results have the shapes, types and strides of real ones.

    Nothing is written to an input.
    """
    query, key, value = (
        torch.rand(2, 9, 3, 4, device=device).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    edges = [torch.full((1, 1, 3, 9), -0.1, device=device, requires_grad=True) for _ in range(2)]
    arguments = (
        query,
        key,
        value,
        *edges,
        None,
        None,
        None,
        0.0,
        1.0,
        True,
        1e-6,
        4,
        torch.float32,
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(lion_triton.fused_forward, arguments, test_utils=tests)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    torch.library.opcheck(
        lion_triton.fused_features,
        (query, None, mask, "normalized_silu", torch.float32),
        test_utils=tests,
    )


@pytest.mark.parametrize("batch", (1, 2))
def test_gradients_of_gates_lie_as_the_gates_do(batch, device):
    """Compiled programs rely on it; a model's gates are (B, L, H) in memory."""
    tensors = [torch.rand(2, 9, 3, 4, device=device).transpose(1, 2) for _ in range(4)]
    grad, query, key, value = tensors
    edges = [-torch.rand(1, batch, 9, 3, device=device).transpose(2, 3) for _ in range(2)]
    shared = *edges, None, None, None
    output, divisor = lion_triton.fused_forward(
        query, key, value, *shared, 0.0, 1.0, True, 1e-6, 4, torch.float32
    )
    torch.library.opcheck(
        lion_triton.fused_backward,
        (grad, query, key, value, *shared, output, divisor, 0.0, 1.0, True, 4),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_registered_twice(device):
    """Code that came with a checkpoint is executed again when it changes."""
    importlib.reload(lion_triton)
    query = torch.rand(1, 1, 5, 4, device=device)
    assert (
        lion_triton.fused_chunkwise(query, query, query, None, None, 1.0, None).shape == query.shape
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "cuda"}, "backend='cuda': expected one of ('auto', 'torch', 'triton')"),
        (
            {"dtype": torch.float64},
            "query, key and value are torch.float64, torch.float64, torch.float64: expected",
        ),
        ({"head_dim": 257}, "heads of 257 and 257: expected sizes from 1 to 256"),
        (
            {"need_weights": True},
            "need_weights=True needs stored scores, which the kernels do not keep: expected False",
        ),
        (
            {"form": "recurrent", "requires_grad": True},
            "form='recurrent' with gradients: expected 'attention' or 'chunk'",
        ),
    ],
)
def test_refusals_say_why(change, message, device):
    change = {"backend": "triton"} | change
    build = {name: change.pop(name) for name in ("dtype", "requires_grad") if name in change}
    inputs = [
        torch.rand(1, 1, 5, change.get("head_dim", 4), device=device, **build) for _ in range(3)
    ]
    change.pop("head_dim", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        lion_attention(*inputs, **change)


def test_where_only_plain_operations_will_do(device):
    """torch.func cannot transform the kernels, and a portable program has none."""
    query = torch.rand(2, 1, 1, 5, 4, device=device)
    message = "backend='triton': the kernels are not plain operations"
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(lambda x: fused(x, x, x))(query)

    class Network(torch.nn.Module):
        def forward(self, x):
            return fused(x, x, x)

    with lion_hf.portable_export(), pytest.raises(Exception, match=message):
        torch.export.export(Network(), (query[0],))


def test_without_kernels(monkeypatch):
    """Where triton or a device is missing the torch forms serve.

    Who asks for the kernels is told.
    """
    torch_only = {key: value for key, value in lion_ops.TABLE.items() if key[0] == "torch"}
    monkeypatch.setattr(lion_ops, "TABLE", torch_only)
    inputs = [torch.rand(1, 1, 5, 4) for _ in range(3)]
    assert lion_attention(*inputs).shape == (1, 1, 5, 4)
    with pytest.raises(
        ValueError, match="backend='triton': triton was not found, or no CUDA device"
    ):
        fused(*inputs)


def test_the_cpu_is_never_chosen_for_the_kernels(monkeypatch):
    """The interpreter is for tests: "auto" leaves tensors on the CPU to torch."""
    broken = dict(lion_ops.TABLE)
    for form in FORMS:
        broken["triton", form] = lion_ops.Backend(None, lambda request: None)
    monkeypatch.setattr(lion_ops, "TABLE", broken)
    assert lion_attention(
        *(torch.rand(1, 1, 5, 4) for _ in range(3)), torch.zeros(1, 1, 1)
    ).shape == (1, 1, 5, 4)


# capability, type, head size, options and cases of tests/support/compile_kernels.py
COMPILED = [
    (90, "bfloat16", 64, "normalize masked"),
    (90, "bfloat16", 64, "normalize attention orders dropout"),
    *[
        (90, dtype, head, "normalize chunk")
        for dtype in ("bfloat16", "float16", "float32")
        for head in (64, 80, 256)
    ],
    (90, "bfloat16", 256, "orders"),
    (90, "float32", 64, "orders"),
    (80, "bfloat16", 64, "normalize masked chunk orders"),
    (80, "float32", 128, "chunk"),
]


@pytest.mark.parametrize(
    "capability, dtype, head, options",
    [
        (90, "bfloat16", 64, "attention chunk recurrent features"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED),
    ],
)
def test_kernels_compile(capability, dtype, head, options):
    """For GPUs that need not be there.

    They take the shared memory that every card has, and spill next to no registers.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "tests/support/compile_kernels.py",
        str(capability),
        dtype,
        str(head),
        *options.split(),
    ]
    environment["PYTHONPATH"] = str(root)
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=root
    ).stdout
    kernels = [json.loads(line) for line in output.splitlines()]
    assert {"forward_kernel", "grad_query_kernel", "grad_key_value_kernel"} <= {
        x["kernel"] for x in kernels
    }
    for x in kernels:
        assert x["shared"] <= 101_376, (
            x
        )  # what a program may have on cards of capability 8.6 and 8.9, the least of all
        assert x["local"] <= (256 if dtype != "float32" else 1024), x
        if capability == 90 and x["kernel"] == "forward_kernel" and dtype != "float32":
            assert x["wgmma"], x


def reference(inputs: dict, options: dict, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in float64 by the torch chunk form."""
    inputs = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    output = lion_attention(**inputs, **options, form="chunk", backend="torch")
    return [output, *torch.autograd.grad(output, list(inputs.values()), grad.double())]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), *HALF], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("head_dim", (64, 80, 128))
@pytest.mark.parametrize(
    "length, form", [(128, "attention"), (197, "attention"), (513, "chunk"), (4096, "chunk")]
)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("normalize", (False, True))
def test_real_sizes(normalize, mask_type, length, form, head_dim, dtype, tolerance):
    """The model's sizes on a GPU, each gradient by name.

    Padding, two documents, two orders up to 197 tokens.
    """
    shape, ordered = (2, 3, length, head_dim), length == 197
    inputs = {
        name: torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()
        for name in ("query", "key", "value")
    }
    options = {"normalize": normalize, "attention_mask": torch.ones(2, length, device="cuda")}
    if normalize:  # as in image models
        options["feature_map"] = "elu_plus_one" if mask_type == "lit" else "normalized_silu"
    options["attention_mask"][1, length // 2 :] = 0
    if mask_type != "lit":
        gates = (2,) * ordered + ((2, 3, length) if mask_type == "selective" else (1, 3, 1))
        inputs["log_decay"] = F.logsigmoid(torch.randn(gates, device="cuda") + 3).requires_grad_()
    if ordered:
        options["order"] = torch.stack([torch.randperm(length, device="cuda") for _ in range(2)])
    else:
        options["seq_idx"] = (torch.arange(length, device="cuda") > length // 3).long()[None]
    output = fused(**inputs, **options, form=form)
    grad = torch.randn_like(output) * options["attention_mask"][:, None, :, None].to(dtype)
    found = [output, *torch.autograd.grad(output, list(inputs.values()), grad)]
    for name, x, y in zip(("output", *inputs), found, reference(inputs, options, grad)):
        error = (x.double() - y).abs().max().item()
        assert error <= tolerance * max(y.abs().max().item(), 1.0), f"{name}: error {error:.3g}"


@pytest.mark.gpu
def test_a_million_tokens():
    query, key, value = (
        torch.rand(1, 2, 1_000_000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    gates = torch.full((1, 2, 1), -0.1, device="cuda")
    with torch.no_grad():
        output = fused(query, key, value, gates, normalize=True, form="chunk")
        for middle in (0, 500_000, 999_999):
            # beyond 400 tokens the product of the gates leaves no trace
            near = slice(max(0, middle - 400), middle + 401)
            inputs = [x[:, :, near].double() for x in (query, key, value)]
            expected = lion_attention(*inputs, gates, normalize=True, form="chunk")[
                :, :, middle - near.start
            ]
            torch.testing.assert_close(
                output[:, :, middle].double(), expected, rtol=2**-6, atol=2**-8
            )


@pytest.mark.gpu
def test_more_heads_than_a_grid_axis_holds():
    """Beyond 65,535 heads only the first axis of a grid counts on; the CPU has no such axes."""
    inputs = [torch.randn(70, 1000, 3, 4, requires_grad=True) for _ in range(3)]
    gates = torch.full((1, 1, 1), -0.1)
    options = {"form": "chunk", "chunk_size": 2}
    expected = lion_attention(*inputs, gates, backend="torch", **options)
    output = fused(*(x.cuda() for x in inputs), gates.cuda(), **options).cpu()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    found, expected = (torch.autograd.grad(x.square().sum(), inputs) for x in (output, expected))
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
