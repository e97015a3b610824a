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
MAPS = [("normalized_silu", True), ("normalized_silu", False), ("identity", False)]


def problem(gate: float, orders: int, length: int = 40) -> tuple[list, torch.Tensor, dict]:
    """Query, key, value, log-decay in float64; the output's gradient; and the orders."""
    torch.manual_seed(0)
    tensors = [torch.randn(3, length, 3, size).transpose(1, 2) for size in (8, 8, 5, 5)]
    *operands, grad = [x.double() for x in tensors]
    # the first head is as quick as this; if all were, a token would hardly see its neighbours
    means = torch.tensor([gate, -0.1, -0.3]).double()[:, None] / LOG2_E
    log_decay = means * (0.5 + torch.rand(orders, 3, 3, length).double())
    order = torch.stack([torch.randperm(length) for _ in range(orders)]) if orders > 1 else None
    options = {"order": order}
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
@pytest.mark.parametrize("orders", (1, 2))
@pytest.mark.parametrize("feature_map, normalize", MAPS)
@pytest.mark.parametrize("gates", GATES)
def test_one_chunk(gates, feature_map, normalize, orders, dtype, tolerance, served, monkeypatch):
    """Output and every gradient, in blocks of one row and of all rows."""
    inputs, grad, options = problem(GATES[gates][0], orders)
    options |= {"feature_map": feature_map, "normalize": normalize}
    expected = results(inputs, grad, torch.float64, form="attention", **options)
    for scores in (1, 2**20):
        monkeypatch.setattr("lion_hf.modeling.lion_chunk_parts.SCORES_AT_A_TIME", scores)
        for x, y in zip(results(inputs, grad, dtype, form="chunk", **options), expected):
            assert (x - y).abs().max() <= tolerance * y.abs().max()
    assert served == [True, True]


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
    mask = torch.ones(3, 40)
    lion_attention(*inputs, form="chunk", attention_mask=mask)
    lion_attention(*inputs, form="chunk", chunk_size=16)
    lion_attention(*inputs, form="chunk", feature_map="elu_plus_one")
    torch.func.vmap(lambda x: lion_attention(x, *inputs[1:], form="chunk"))(inputs[0][None])
    assert served == [False] * 4
    lion_attention(*inputs, form="chunk", chunk_size=40)
    assert served[-1]


def test_second_derivatives(served):
    inputs, _, _ = problem(-0.1, 1, length=5)
    leaves = [x.requires_grad_() for x in inputs]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        options = {"feature_map": "normalized_silu", "normalize": True}
        return lion_attention(*tensors, form="chunk", chunk_size=8, **options)

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
    _, slopes = lion_short._features("normalized_silu", x, torch.float32, record=True)
    exact = x.double().requires_grad_()
    silu = torch.nn.functional.silu(exact)
    (expected,) = torch.autograd.grad(silu.sum(), exact)
    norms = torch.linalg.vector_norm(silu.detach() + 0.5, dim=-1, keepdim=True)
    torch.testing.assert_close(slopes.double() * norms, expected, atol=1e-6, rtol=0)
