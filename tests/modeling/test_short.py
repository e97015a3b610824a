"""Rows of one chunk on a CPU, which have a path of their own with feature map and divisor."""

import pytest
import torch

from lion_hf import LionConfig, LionModel, lion_attention
from lion_hf.modeling import lion_short, lion_torch
from lion_hf.modeling.lion_chunk_parts import LARGEST_RANGE, LOG2_E, NEGLIGIBLE, Decays

# mean log2 of the first head's gates, for 40 tokens -> roots that masks are made of (None: powers
# of differences), and whether negligible entries are cut off
GATES = {
    "slow": (-0.1, 0, False),
    "quick": (-4.0, 0, True),
    "quicker": (-16.0, 2, True),
    "at once": (-60.0, None, True),
}
MAPS = [
    ("normalized_silu", True),
    ("normalized_silu", False),
    ("identity", False),
    ("elu_plus_one", True),
    ("exponential", True),
    ("sqrt_softmax", True),
    ("sqrt_softmax", False),
]

SECOND = [("normalized_silu", False), ("exponential", True), ("sqrt_softmax", True)]


def problem(
    gate: float, orders: int, length: int = 40, padded: bool = False
) -> tuple[list, torch.Tensor, dict]:
    """Query, key, value, log-decay in float64; the output's gradient; the orders and the mask."""
    torch.manual_seed(0)
    tensors = [torch.randn(3, length, 3, size).transpose(1, 2) for size in (8, 8, 5, 5)]
    *operands, grad = [x.double() for x in tensors]
    # the first head is as quick as this; if all were, a token would hardly see its neighbours
    means = torch.tensor([gate, -0.1, -0.3]).double()[:, None] / LOG2_E
    log_decay = means * (0.5 + torch.rand(orders, 3, 3, length).double())
    order = torch.stack([torch.randperm(length) for _ in range(orders)]) if orders > 1 else None
    mask = None
    if padded:  # at the front, inside and at the end
        mask = torch.ones(3, length)
        mask[0, :3] = mask[0, 9:11] = mask[1, -5:] = 0
    options = {"order": order, "attention_mask": mask}
    return [*operands, log_decay if orders > 1 else log_decay[0]], grad, options


def results(inputs: list, grad: torch.Tensor, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    output = lion_attention(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]


@pytest.fixture
def served(monkeypatch) -> list[bool]:
    """Whether each call of the chunk form took the short path."""
    calls, is_short = [], lion_torch.is_short
    monkeypatch.setattr(lion_torch, "is_short", lambda x: calls.append(is_short(x)) or calls[-1])
    return calls


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("orders, padded", [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("feature_map, normalize", MAPS)
@pytest.mark.parametrize("gates", GATES)
def test_one_chunk(
    gates, feature_map, normalize, orders, padded, dtype, tolerance, served, monkeypatch
):
    """Output and every gradient, in blocks of one row and of all rows."""
    inputs, grad, options = problem(GATES[gates][0], orders, padded=padded)
    options |= {"feature_map": feature_map, "normalize": normalize}
    expected = results(inputs, grad, torch.float64, form="attention", **options)
    for scores in (1, 2**20):
        monkeypatch.setattr("lion_hf.modeling.lion_chunk_parts.SCORES_AT_A_TIME", scores)
        for x, y in zip(results(inputs, grad, dtype, form="chunk", **options), expected):
            assert (x - y).abs().max() <= tolerance * y.abs().max()
    assert served == [True, True]


@pytest.mark.parametrize("feature_map, normalize", MAPS)
def test_what_stands_at_padding_counts_for_nothing(feature_map, normalize, served):
    """Not in the output, which is 0 there, nor in the gradients; also if it is not a number."""
    inputs, grad, options = problem(-0.1, 1, padded=True)
    hidden = (options["attention_mask"] == 0)[:, None, :, None]
    options |= {"feature_map": feature_map, "normalize": normalize, "form": "chunk"}
    expected = results(inputs, grad, torch.float32, **options)
    spoilt = [x.masked_fill(hidden, float("nan")) for x in inputs[:3]]
    found = results([*spoilt, inputs[3]], grad, torch.float32, **options)
    for x, y in zip(found, expected):
        assert torch.equal(x, y)
    assert all((x * hidden == 0).all() for x in found[:4]) and all(served)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_exponents_beyond_their_limit_have_no_slope(dtype, served):
    inputs, grad, options = problem(-0.1, 1)
    inputs[0], inputs[1] = 8 * inputs[0], 8 * inputs[1]
    assert (inputs[0].abs() > 10).any() and (inputs[0].abs() < 10).any()
    options |= {"feature_map": "exponential", "normalize": True}
    expected = results(inputs, grad, torch.float64, form="attention", **options)
    found = results(inputs, grad, dtype, form="chunk", **options)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for x, y in zip(found, expected):
        assert (x - y).abs().max() <= tolerance * y.abs().max()
    assert ((found[1] == 0) == (inputs[0].abs() > 10)).all() and served[-1]


@pytest.mark.parametrize("gates", GATES)
def test_gates_take_every_way_to_a_mask(gates, monkeypatch):
    """The premise of the test above."""
    seen, build = [], Decays.__init__

    def watched(self, *args):
        build(self, *args)
        seen.append((self.roots, self.tiny))

    monkeypatch.setattr(Decays, "__init__", watched)
    inputs, _, _ = problem(GATES[gates][0], 1)
    lion_attention(*[x.float() for x in inputs], form="chunk")
    assert seen == [GATES[gates][1:]]


@pytest.mark.parametrize("scale", (1e-30, 1e-3, 1e3, 1e30, -1.0, 0.0))
def test_scales(scale):
    """A scale does not decide what is negligible in a mask, nor leave the range of float32."""
    inputs, _, _ = problem(LARGEST_RANGE * NEGLIGIBLE[torch.float32] / 40 / 1.6, 1)
    single = lion_attention(*[x.float() for x in inputs], form="chunk", scale=scale)
    expected = lion_attention(*inputs, form="attention", scale=scale)
    assert (single - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_the_short_path_leaves_to_others(served):
    inputs, grad, _ = problem(-0.1, 1)
    lion_attention(*inputs, form="chunk", chunk_size=16)
    lion_attention(*inputs, form="chunk", need_weights=True)
    torch.func.vmap(lambda x: lion_attention(x, *inputs[1:], form="chunk"))(inputs[0][None])
    assert served == [False] * 3
    lion_attention(*inputs, form="chunk", chunk_size=40)
    assert served[-1]


@pytest.mark.parametrize("feature_map, padded", SECOND)
def test_second_derivatives(feature_map, padded, served):
    inputs, _, given = problem(-0.1, 1, length=12 if padded else 5, padded=padded)
    leaves = [x.requires_grad_() for x in inputs]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        options = given | {"feature_map": feature_map, "normalize": True}
        return lion_attention(*tensors, form="chunk", chunk_size=16, **options)

    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    assert all(served)


@pytest.mark.parametrize("feature_map, normalize", MAPS)
def test_the_output_and_the_gradients_can_be_written_to(feature_map, normalize, served):
    inputs, grad, _ = problem(-0.1, 1)
    leaves = [x.requires_grad_() for x in inputs]
    options = {"feature_map": feature_map, "normalize": normalize, "form": "chunk"}
    expected = torch.autograd.grad(lion_attention(*leaves, **options), leaves, 2 * grad)
    output = lion_attention(*leaves, **options)
    output.mul_(2)
    found = torch.autograd.grad(output, leaves, grad)
    torch.testing.assert_close(found, expected)
    for x in found:
        x.zero_()
    assert all(served)


@pytest.mark.parametrize("feature_map, normalize", MAPS)
def test_many_gradients_at_once(feature_map, normalize, served):
    inputs, grad, _ = problem(-0.1, 1)
    leaves = [x.requires_grad_() for x in inputs]
    output = lion_attention(*leaves, feature_map=feature_map, normalize=normalize, form="chunk")
    grads = torch.stack([grad, grad.flip(0), -grad])
    together = torch.autograd.grad(output, leaves, grads, is_grads_batched=True, retain_graph=True)
    for n, one in enumerate(grads):
        expected = torch.autograd.grad(output, leaves, one, retain_graph=True)
        torch.testing.assert_close([x[n] for x in together], [*expected])
    assert all(served) and not any(x.requires_grad for x in together)


def test_a_mask_without_padding_is_none():
    """It costs nothing then, and changes nothing."""
    torch.manual_seed(0)
    config = LionConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, mask_type="selective",
    )  # fmt: skip
    model, seen = LionModel(config).eval(), []
    model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    input_ids, mask = torch.randint(30, (2, 9)), torch.ones(2, 9)
    outputs = [model(input_ids, x).last_hidden_state for x in (None, mask)]
    assert torch.equal(*outputs)
    mask[0, 3] = 0
    assert not torch.equal(model(input_ids, mask).last_hidden_state, outputs[0])
    assert seen[:2] == [None, None] and seen[2] is not None


@pytest.mark.parametrize("size", [30.0, 100.0, 1000.0])
def test_the_slope_of_large_features_keeps_its_digits(size):
    """silu'(x) is 1 there; as sigmoid + s - s sigmoid it was wrong by a rounding of s."""
    x = torch.linspace(-size, size, 400).view(1, 1, 50, 8)
    _, slopes = lion_short._normalized_silu(x.clone(), record=True)
    exact = x.double().requires_grad_()
    silu = torch.nn.functional.silu(exact)
    (expected,) = torch.autograd.grad(silu.sum(), exact)
    norms = torch.linalg.vector_norm(silu.detach() + 0.5, dim=-1, keepdim=True)
    torch.testing.assert_close(slopes.double() * norms, expected, atol=1e-6, rtol=0)


def test_many_masks_or_orders_at_once(served):
    """Gates of edges, or one for all, do not show that the mask or the order is batched."""
    (*operands, log_decay), _, options = problem(-0.1, 2, padded=True)
    masks = torch.stack([options["attention_mask"], options["attention_mask"].flip(1)])
    orders = torch.stack([options["order"], options["order"].flip(0, 1)])

    def masked(mask: torch.Tensor) -> torch.Tensor:
        edges = log_decay[0], log_decay[1]
        return lion_attention(*operands, edges, attention_mask=mask, form="chunk")

    def ordered(order: torch.Tensor) -> torch.Tensor:
        return lion_attention(*operands, log_decay[:, :1, :, :1], order=order, form="chunk")

    for function, many in ((masked, masks), (ordered, orders)):
        expected = torch.stack([function(x) for x in many])
        assert served == [True, True]
        torch.testing.assert_close(torch.func.vmap(function)(many), expected)
        assert served.pop() is False
        served.clear()
