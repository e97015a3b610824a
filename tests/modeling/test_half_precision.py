"""bfloat16 and float16 against float64.

Long rows, gates at both ends, feature maps, pooling, whole models.

The grid at 65 tokens is in test_equivalence.py, gates of every size in 150 tokens in
test_operation.py, and the table over forms and lengths in benchmarks/results/precision-cpu.md.
"""

import copy

import pytest
import torch
from support.marks import slow_except
from support.models import IMAGE_FAMILIES, image_config, inputs_of, model, text_config, token_ids

from lion_hf import LionConfig, LionForSequenceClassification, lion_attention
from lion_hf.modeling.configuration_lion import MASK_TYPES
from lion_hf.modeling.lion_naive import FEATURE_MAPS, map_features
from lion_hf.modeling.lion_packing import pool

HALF = [torch.bfloat16, torch.float16]
# Largest error over the largest entry. All sums are float32, so what is left is the rounding of the
# result: half a unit in the last place, 2**-9 or 2**-12 of a number just above a power of two's
# double, and twice that of one just above a power of two.
ROUNDING = {torch.bfloat16: 1.02 * 2**-8, torch.float16: 1.02 * 2**-11}
# Gradients of log-decays stay in float32. They are sums over all later tokens, in which large parts
# cancel: within a chunk in the chunk form, over the whole row in the attention form.
LOG_DECAYS = {"attention": 2e-3, "chunk": 2e-4, "recurrent": 2e-4}
# Whole models, in the Euclidean norm: every layer's results are rounded, in bfloat16 to 2**-9 and
# in float16 to 2**-12, and errors of some ten such steps add up.
MODELS = {torch.bfloat16: 0.05, torch.float16: 0.05 / 8}
# In float16 too: a token's part in the mean over 65,536 has gradients near its smallest numbers.
LONG = 0.05


def problem(
    family: str, length: int, normalize: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """Inputs that both half types hold exactly, and the output's gradient.

    There is one head for each kind of gates.
    """
    random = torch.sigmoid(torch.randn(length) * 2 + 1)
    ends = torch.randint(0, 3, (length,))
    near_one = 1 - 10 ** -(3 + 3 * torch.rand(length))
    kinds = [
        random,
        near_one,
        torch.ones(length),
        torch.where(ends == 0, 0, torch.where(ends == 1, 1, random)),
    ]
    # with a divisor these leave a token little but itself, and no gradient to speak of
    if not normalize:
        kinds += [10 ** -(3 + 3 * torch.rand(length)), torch.zeros(length)]
    if length > 1000:  # both ends in any case
        kinds = kinds[::3] + kinds[2:3] + kinds[5:]
    if family == "decay":
        kinds = [x[:1] for x in kinds]
    log_decay = None if family == "lit" else torch.stack(kinds)[None].log()
    heads = 2 if family == "lit" else log_decay.shape[1]

    def draw(feature: bool = False) -> torch.Tensor:
        x = torch.randn(1, heads, length, 4)
        x = (x.abs() + 0.1 if feature and normalize else x).bfloat16().float()
        return torch.where(x.abs() < 2**-14, 0, x)  # below, float16 loses digits

    return [draw(True), draw(True), draw()], log_decay, draw()


def results(inputs, log_decay, weight, dtype, autocast=False, **options) -> list[torch.Tensor]:
    """Output and gradients of query, key, value and log-decays."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    if log_decay is not None:
        leaves.append(
            log_decay.to(torch.float64 if dtype == torch.float64 else torch.float32)
            .clone()
            .requires_grad_()
        )
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = lion_attention(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight.to(dtype))]


def check(
    found: list[torch.Tensor],
    expected: list[torch.Tensor],
    dtype: torch.dtype,
    form: str,
    floor: float,
) -> None:
    """Head by head, relative to the largest entry, or to `floor` where that is less."""
    for place, (x, y) in enumerate(zip(found, expected)):
        assert torch.isfinite(x).all()
        largest = y.abs().flatten(2).amax(-1).clamp(min=floor)
        error = ((x.double() - y).abs().flatten(2).amax(-1) / largest).max().item()
        assert error <= (LOG_DECAYS[form] if place == 4 else ROUNDING[dtype]), (place, error)


@pytest.mark.parametrize("normalize", (False, True), ids=lambda x: "normalized" if x else "plain")
@pytest.mark.parametrize(
    "form, length",
    slow_except(
        [("attention", 1000), ("recurrent", 200), ("chunk", 1000), ("chunk", 65_536)],
        ("attention", 1000),
        ("recurrent", 200),
        ("chunk", 1000),
    ),
)
@pytest.mark.parametrize("family", MASK_TYPES)
def test_operation(family, form, length, normalize):
    """Both types, also under autocast, are as near as rounding lets them be.

    The reference is float64 in chunks of 500.
    """
    inputs, log_decay, weight = problem(family, length, normalize)
    options = {"normalize": normalize, "form": form}
    floor = 1e-3 if normalize else 1.0  # plain sums are of the size of the inputs or above
    exact = "attention" if length <= 1000 else "chunk"
    expected = results(
        inputs, log_decay, weight, torch.float64, normalize=normalize, form=exact, chunk_size=500
    )
    for dtype in HALF:
        found = results(inputs, log_decay, weight, dtype, **options)
        check(found, expected, dtype, form, floor)
        if length > 1000:
            continue
        again = results(inputs, log_decay, weight, dtype, autocast=True, **options)
        assert all(torch.equal(x, y) for x, y in zip(found, again))


@pytest.mark.parametrize("normalize", (False, True))
def test_the_reference_and_the_bounds(normalize):
    """Chunks in float64 are the definition at 1,000 tokens.

    One wrong gate in a thousand breaks every bound.
    """
    inputs, log_decay, weight = problem("selective", 1000, normalize)
    options = {"normalize": normalize, "chunk_size": 300}
    definition, chunks = (
        results(inputs, log_decay, weight, torch.float64, form=f, **options)
        for f in ("attention", "chunk")
    )
    for x, y in zip(definition, chunks):
        assert (x - y).abs().max() <= 1e-10 * x.abs().max()
    log_decay[..., 500] = -0.3
    wrong = results(inputs, log_decay, weight, torch.float64, form="chunk", **options)
    for place in range(5):
        with pytest.raises(AssertionError):
            check(
                [*definition[:place], wrong[place], *definition[place + 1 :]],
                definition,
                torch.bfloat16,
                "attention",
                1e-3,
            )


def test_gradients_beyond_float16_are_infinite_and_never_nan():
    """An output saturates, but a gradient tells of an overflow.

    GradScaler expects that, and then skips the step.
    """
    query, key, value = (
        torch.ones(1, 1, 2000, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)
    )
    output = lion_attention(query, key, value, torch.zeros(1, 1, 1), scale=0.5)
    assert (output == 64_000).all()
    gradients = torch.autograd.grad(output, (query, key, value), torch.full_like(output, 2.0))
    for gradient in gradients:
        assert torch.isinf(gradient).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps(name, dtype):
    """Entry by entry to at most three roundings, small features too.

    It is the same whether gradients are recorded or not.
    """
    x = torch.linspace(-9, 9, 640).view(10, 64).to(dtype)
    expected = FEATURE_MAPS[name](x.double())
    found = map_features(name, x, x)
    smallest = torch.finfo(dtype).smallest_normal * ROUNDING[dtype]  # of numbers below the normal
    allowed = 3 * ROUNDING[dtype] * expected.abs() + smallest
    assert ((found.double() - expected).abs() <= allowed).all()
    recorded = map_features(name, x.clone().requires_grad_(), x)
    torch.testing.assert_close(recorded, found, rtol=ROUNDING[dtype], atol=0)
    if name == "elu_plus_one":
        (gradient,) = torch.autograd.grad(
            FEATURE_MAPS[name](leaf := x.clone().requires_grad_()).sum(), leaf
        )
        assert ((gradient.double() - x.double().clamp(max=0).exp()).abs() <= ROUNDING[dtype]).all()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("tokens", (40_000, 70_000))
def test_mean_pooling_of_long_rows(tokens, dtype):
    """A sum above 65,504, and more tokens than that."""
    states = torch.full((1, tokens, 2), 2.0, dtype=dtype)
    for mask in (None, torch.ones(1, tokens)):
        pooled = pool(states, mask, "mean")
        assert pooled.dtype == dtype and (pooled == 2).all()


def network_results(
    network, inputs, scale: float, autocast: torch.dtype | None = None
) -> tuple[torch.Tensor, dict]:
    """Logits and the gradients of all parameters, of a scaled loss, as GradScaler makes it."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        outputs = network(**inputs)
    (outputs.loss * scale).backward()
    return outputs.logits.detach().double(), {
        n: p.grad.double() / scale for n, p in network.named_parameters()
    }


# On the CPU torch adds up these gradients in the type of the weights, token by token. In bfloat16
# no sum grows beyond 256 times what is added; at 65,536 tokens such gradients are finite and no
# more. Under autocast they are float32.
ADDED_UP_IN_HALF = ("norm", "embeddings")


def check_network(network, inputs, long: bool = False) -> None:
    """In every form the results are finite and near float64.

    Under autocast, and with weights in half precision, with and without the gates.
    """
    # GradScaler tries the first, and finds the second for short rows
    scale = 2.0**16 if long else 2.0**10
    expected = network_results(copy.deepcopy(network).double(), cast(inputs, torch.float64), scale)
    for dtype in HALF:
        for mode in (
            ("autocast", "gates in float32") if long else ("autocast", "gates in float32", "all")
        ):
            half = copy.deepcopy(network).to(torch.float32 if mode == "autocast" else dtype)
            for name, module in half.named_modules():
                if name.endswith(".gate") and mode == "gates in float32":
                    module.float()
            if mode == "autocast":
                found = network_results(half, inputs, scale, autocast=dtype)
            else:
                found = network_results(half, cast(inputs, dtype), scale)
            logits, gradients = found
            assert all(torch.isfinite(x).all() for x in (logits, *gradients.values()))
            names = [
                n
                for n in gradients
                if mode == "autocast" or not long or not any(x in n for x in ADDED_UP_IN_HALF)
            ]
            assert len(names) > 5
            joined = [
                torch.cat([found[name].flatten() for name in names])
                for found in (gradients, expected[1])
            ]
            for x, y in ((logits, expected[0]), joined):
                error = ((x - y).norm() / y.norm()).item()
                assert error < (LONG if long else MODELS[dtype]), (dtype, mode, error)


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize("form", ("attention", "chunk", "recurrent"))
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_text_models(mask_type, form):
    network = model("MaskedLM", text_config(mask_type, attention_form=form, initializer_range=0.1))
    inputs = inputs_of("MaskedLM", network.config, length=23)
    inputs["attention_mask"][1, :9] = 0
    check_network(network, inputs)


@pytest.mark.parametrize("form", ("attention", "chunk", "recurrent"))
@pytest.mark.parametrize("mask_type, patch_order", IMAGE_FAMILIES)
def test_image_models(mask_type, patch_order, form):
    network = model(
        "ImageClassification",
        image_config(mask_type, patch_order, attention_form=form, initializer_range=0.1),
    )
    check_network(network, inputs_of("ImageClassification", network.config))


@pytest.mark.slow
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_a_text_model_of_65536_tokens(mask_type):
    """Forward and backward, with padding and mean pooling, whose sum is beyond float16."""
    config = LionConfig(
        mask_type=mask_type,
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=65_536,
        classifier_pooling="mean",
        num_labels=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    network = LionForSequenceClassification(config).eval()
    with torch.no_grad():
        network.lion.layers[0].mlp_norm.bias.fill_(3.0)  # the mean of the states
    mask = torch.ones(1, 65_536, dtype=torch.long)
    mask[:, -100:] = 0
    inputs = {
        "input_ids": token_ids(1, 65_536) % 50,
        "attention_mask": mask,
        "labels": torch.tensor([1]),
    }
    assert (
        network.lion(inputs["input_ids"]).last_hidden_state.sum(1).max()
        > torch.finfo(torch.float16).max
    )
    check_network(network, inputs, long=True)


@pytest.mark.parametrize("chunk_size", (50, 200), ids=("several chunks", "one chunk"))
def test_gradients_of_small_gates_in_float32(chunk_size):
    """Gates near 0 have small gradients.

    The tokens' parts, in themselves a million times as large, must not spoil them.
    """
    inputs = [torch.randn(1, 1, 200, 4) for _ in range(3)]
    edges = tuple((10 ** -(5 + torch.rand(1, 1, 200))).log() for _ in range(2))
    weight, found = torch.randn(1, 1, 200, 4), {}
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in edges]
        output = lion_attention(
            *(x.to(dtype) for x in inputs), tuple(leaves), form="chunk", chunk_size=chunk_size
        )
        found[dtype] = torch.autograd.grad(output, leaves, weight.to(dtype))
    for x, y in zip(found[torch.float32], found[torch.float64]):
        assert 0 < y.abs().max() < 1e-3
        assert (x.double() - y).abs().max() < 1e-5 * y.abs().max()
