"""Derivatives beyond the first gradient: of the gradient itself, in forward mode, by torch.func.

The references are numeric derivatives, and the definition in `oracle.py`, which autograd
differentiates.
"""

import pytest
import torch
from support.models import model, text_config, token_ids
from support.oracle import FEATURES, MASK_TYPES, definition, make_problem
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lion_hf import lion_attention
from lion_hf.modeling import lion_chunkwise, lion_numerics
from lion_hf.modeling.configuration_lion import FORMS
from lion_hf.modeling.lion_chunk_parts import ChunkInputs

CASES = [(form, size) for form in FORMS for size in ((3, 50) if form == "chunk" else (None,))]


def operation(problem, **options):
    """`lion_attention` as a function of the problem's inputs, in their order."""
    names = list(problem.inputs)
    return lambda *tensors: lion_attention(
        **dict(zip(names, tensors)), **problem.options, **options
    )


def exact(problem):
    """The definition as such a function."""
    options = problem.options
    features = FEATURES[options.get("feature_map", "identity")]

    def function(query, key, value, log_decay=None):
        if log_decay is not None and "order" not in options:
            log_decay = log_decay[None]
        given = (options.get(name) for name in ("attention_mask", "seq_idx", "order"))
        operands = features(query), features(key), value
        return definition(*operands, log_decay, *given, options["scale"], options["normalize"])

    return function


def small_problem(mask_type, ordered, feature_map="identity", length=7, **sizes):
    sizes = {"batch": 1, "heads": 2, "head_dim": 2, "value_dim": 2, **sizes}
    options = {"padding": "interior", "packed": True, "normalize": True}
    return make_problem(
        mask_type, length, ordered=ordered, feature_map=feature_map, **options, **sizes
    )


def hessian_product(function, inputs, weight):
    """The derivative of a loss's gradient along random directions, for every input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    generator = torch.Generator().manual_seed(0)
    loss = (function(*inputs).double() * weight).square().sum()
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    along = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs]
    product = sum((g * t.to(g)).sum() for g, t in zip(grads, along))
    return torch.autograd.grad(product, inputs)


@pytest.mark.parametrize("form, chunk_size", CASES)
@pytest.mark.parametrize("ordered", (False, True), ids=lambda x: "orders" if x else "raster")
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_second_derivatives(mask_type, ordered, form, chunk_size):
    """Of the output with respect to every input, through padding, documents and the divisor."""
    problem = small_problem(mask_type, ordered)
    function = operation(problem, form=form, chunk_size=chunk_size)
    inputs = tuple(problem.inputs.values())
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    found, expected = (
        hessian_product(f, inputs, problem.weight) for f in (function, exact(problem))
    )
    assert max(x.abs().max() for x in expected) > 1e-2
    for name, x, y in zip(problem.inputs, found, expected):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("feature_map", [name for name in FEATURES if name != "identity"])
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_through_feature_maps(form, feature_map):
    problem = small_problem("selective", False, feature_map)
    inputs = tuple(problem.inputs.values())
    functions = operation(problem, form=form, chunk_size=3), exact(problem)
    for x, y in zip(*(hessian_product(f, inputs, problem.weight) for f in functions)):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("form, chunk_size", CASES)
@pytest.mark.parametrize("ordered", (False, True), ids=lambda x: "orders" if x else "raster")
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_forward_mode(mask_type, ordered, form, chunk_size):
    """By torch.autograd.forward_ad, with and without gradients beside it, and by torch.func.jvp."""
    problem = small_problem(mask_type, ordered)
    function = operation(problem, form=form, chunk_size=chunk_size)
    inputs = [x.detach() for x in problem.inputs.values()]
    along = [torch.randn_like(x) for x in inputs]
    expected = torch.autograd.functional.jvp(exact(problem), tuple(inputs), tuple(along))[1]
    real = (problem.weight != 0).any(-1, keepdim=True)
    found = [torch.func.jvp(function, tuple(inputs), tuple(along))[1]]
    for recorded in (False, True):
        with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
            duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, along)]
            found.append(forward_ad.unpack_dual(function(*duals)).tangent)
    assert expected.abs().max() > 1e-2
    for x in found:
        torch.testing.assert_close(x * real, expected * real, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_hessian_by_torch_func(form):
    problem = small_problem("selective", False, length=5, heads=1)
    inputs = [x.detach() for x in problem.inputs.values()]

    def loss_of(function):
        return lambda *tensors: (function(*tensors) * problem.weight).square().sum()

    ours = loss_of(operation(problem, form=form, chunk_size=2))
    found = torch.func.hessian(ours, argnums=(0, 3))(*inputs)
    definition_of = loss_of(exact(problem))
    expected = torch.autograd.functional.hessian(
        lambda query, log_decay: definition_of(query, *inputs[1:3], log_decay),
        (inputs[0], inputs[3]),
    )
    for row, expected_row in zip(found, expected):
        for x, y in zip(row, expected_row):
            torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9)


def test_third_derivatives():
    problem = small_problem("selective", False)
    results = []
    for function in (operation(problem, form="chunk", chunk_size=3), exact(problem)):
        x = problem.inputs["query"].detach().requires_grad_()
        others = [x.detach() for x in list(problem.inputs.values())[1:]]
        y = (function(x, *others) * problem.weight).pow(3).sum()
        for _ in range(3):
            (derivative,) = torch.autograd.grad(y, x, create_graph=True)
            y = derivative.sin().sum()
        results.append(derivative)
    torch.testing.assert_close(results[0], results[1], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str
)
def test_the_default_of_longer_rows(dtype, tolerance):
    """What "auto" picks for training a row of 80 tokens, and one tensor as query and as key."""
    problem = make_problem("selective", 80, batch=1, heads=1)
    query, _, value, gates = (x.detach() for x in problem.inputs.values())

    def shared(function):
        return lambda query, value, gates: function(query, query, value, gates)

    inputs = query, value, gates
    expected = hessian_product(shared(exact(problem)), inputs, problem.weight)
    halves = [x.to(dtype) for x in inputs]
    found = hessian_product(shared(operation(problem)), halves, problem.weight)
    for x, y in zip(found, expected):
        assert (x.double() - y).abs().max() <= tolerance * y.abs().max()


def test_a_penalty_on_the_gradient_of_a_model():
    """Its gradients are those of the attention form."""
    network = model("SequenceClassification", text_config(attention_probs_dropout_prob=0))
    embeddings = network.get_input_embeddings()(token_ids(2, 70)).detach().requires_grad_()
    results = []
    for form in ("chunk", "attention"):
        network.config.attention_form = form
        logits = network(inputs_embeds=embeddings).logits
        (grad,) = torch.autograd.grad(logits.square().sum(), embeddings, create_graph=True)
        network.zero_grad()
        grad.square().sum().backward()
        results.append(
            {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        )
    assert results[0].keys() == results[1].keys()
    for name, x in results[1].items():
        assert (results[0][name] - x).abs().max() <= 1e-3 * max(x.abs().max(), 1e-2), name


class NoFloat64(TorchDispatchMode):
    """Raises where a tensor of float64 is made, as a device without that type does.

    It looks into the operators of the chunk form, which the dispatcher takes as a whole.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lion_hf":
            with self:
                return self.inside(func.__name__, *args)
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else (output,):
            if torch.is_tensor(x) and x.dtype == torch.float64:
                raise TypeError(f"{func} made a tensor of float64")
        return output

    @staticmethod
    def inside(name, *args):
        if name.startswith("chunkwise_backward"):
            grad, *tensors, states, scale, chunk_size = args
            inputs = ChunkInputs(*tensors, scale, chunk_size)
            return lion_chunkwise._gradients(inputs, grad, states)
        *inputs, keep_states = args
        return lion_chunkwise._forward(ChunkInputs(*inputs), keep_states)


@pytest.mark.parametrize("chunk_size", (None, 16))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_devices_without_float64(mask_type, form, chunk_size, monkeypatch):
    """Both passes compute in float32 alone, and as exactly as is asked of float32."""
    problem = make_problem(mask_type, 70, "interior", packed=True, normalize=True, batch=1)
    inputs = {name: x.detach().float().requires_grad_() for name, x in problem.inputs.items()}
    options, weight = (
        {"form": form, "chunk_size": chunk_size, "backend": "torch"},
        problem.weight.float(),
    )

    def run():
        output = lion_attention(**inputs, **problem.options, **options)
        return [output, *torch.autograd.grad((output * weight).sum(), list(inputs.values()))]

    if mask_type != "lit" and form != "recurrent":
        with pytest.raises(TypeError, match="made a tensor of float64"), NoFloat64():
            run()  # the premise: where there is float64 it is used
    monkeypatch.setattr(lion_numerics, "WITHOUT_FLOAT64", ("cpu",))
    with NoFloat64():
        found = run()
    real = (problem.weight != 0).any(-1, keepdim=True)
    for x, y in zip((found[0] * real, *found[1:]), problem.expected.values()):
        assert (x.double() - y).abs().max() <= 1e-4 * max(y.abs().max().item(), 1.0)


def test_gates_of_zero_without_float64(monkeypatch):
    """Prefix sums of thousands are rounded to 2e-4 there, and so are the decays."""
    monkeypatch.setattr(lion_numerics, "WITHOUT_FLOAT64", ("cpu",))
    inputs = [torch.randn(1, 2, 300, 4, requires_grad=True) for _ in range(3)]
    gates = torch.where(torch.rand(1, 2, 300) < 0.1, 0.0, 0.9).log().requires_grad_()
    output = lion_attention(*inputs, gates, form="chunk", chunk_size=64)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), [*inputs, gates]))
    expected = lion_attention(*(x.double() for x in inputs), F.relu(-gates).neg(), form="recurrent")
    torch.testing.assert_close(output.double(), expected, atol=2e-3, rtol=2e-3)
