"""attention = recurrent = chunk = the definition.

The grid is families x forms x chunk sizes x lengths x padding x packing x orders.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import FEATURES, MASK_TYPES, PADDINGS, check, make_problem

from lion_hf import lion_attention
from lion_hf.modeling.configuration_lion import FORMS
from lion_hf.modeling.lion_choice import default_chunk_size
from lion_hf.modeling.lion_chunk_parts import SCORES_AT_A_TIME

LENGTHS = (1, 2, 17, 63, 64, 65, 197, 500)
CHUNK_SIZES = (1, 2, 16, 63, "length", "above")
EXACT = [(torch.float64, 1e-10), (torch.float32, 1e-4)]
HALF = [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)]


def forms(length: int, chunk_sizes=CHUNK_SIZES):
    """(form, chunk size) for every form; hundreds of tiny chunks have a test of their own."""
    for form in FORMS:
        if form != "chunk":
            yield form, None
            continue
        for size in chunk_sizes:
            size = {"length": length, "above": length + 7}.get(size, size)
            if length / size <= 100:
                yield form, size


@pytest.mark.parametrize("normalize", (False, True), ids=lambda x: "normalized" if x else "plain")
@pytest.mark.parametrize("ordered", (False, True), ids=lambda x: "orders" if x else "raster")
@pytest.mark.parametrize("packed", (False, True), ids=lambda x: "packed" if x else "single")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("length", [n for n in LENGTHS if n <= 65])
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_short_rows(mask_type, length, padding, packed, ordered, normalize, device):
    """Output and every gradient in float64 to 1e-10, and in float32 to 1e-4."""
    problem = make_problem(mask_type, length, padding, packed, ordered, normalize, device=device)
    for form, chunk_size in forms(length):
        check(problem, lion_attention, torch.float64, 1e-10, form=form, chunk_size=chunk_size)
        if chunk_size in (None, 16):
            check(problem, lion_attention, torch.float32, 1e-4, form=form, chunk_size=chunk_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "padding, packed, ordered",
    [("none", False, False), ("interior", True, False), ("left", False, True)],
)
@pytest.mark.parametrize("length", [n for n in LENGTHS if n > 65])
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_long_rows(mask_type, length, padding, packed, ordered, device):
    problem = make_problem(
        mask_type, length, padding, packed, ordered, normalize=ordered, heads=2, device=device
    )
    for form, chunk_size in forms(length):
        check(problem, lion_attention, torch.float64, 1e-10, form=form, chunk_size=chunk_size)
        if chunk_size in (None, 63):
            check(problem, lion_attention, torch.float32, 1e-4, form=form, chunk_size=chunk_size)


@pytest.mark.slow
@pytest.mark.parametrize("length, chunk_size", [(197, 1), (500, 1), (500, 2)])
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_long_rows_in_tiny_chunks(mask_type, length, chunk_size, device):
    problem = make_problem(
        mask_type, length, "interior", packed=True, normalize=True, batch=1, heads=2, device=device
    )
    check(problem, lion_attention, torch.float64, 1e-10, form="chunk", chunk_size=chunk_size)


@pytest.mark.parametrize("ordered", (False, True), ids=lambda x: "orders" if x else "raster")
@pytest.mark.parametrize("length", (150, 300))
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_more_scores_than_are_computed_at_a_time(mask_type, length, ordered, device):
    """Three rows in blocks of two, in one chunk and in several.

    Also with the chunk size of `CHUNK_SIZES`.
    """
    chunk_size = min(length, default_chunk_size(length, "cpu")[0])
    heads = SCORES_AT_A_TIME // (2 * chunk_size**2)
    assert SCORES_AT_A_TIME // (heads * chunk_size**2) == 2 and (length > chunk_size) == (
        length == 300
    )
    problem = make_problem(
        mask_type, length, "none", False, ordered, batch=3, heads=heads, device=device
    )
    check(problem, lion_attention, torch.float64, 1e-10, form="chunk")
    check(problem, lion_attention, torch.float32, 1e-4, form="chunk")


@pytest.mark.parametrize("dtype, tolerance", HALF, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("padding, packed", [("none", False), ("interior", True)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_half_precision(mask_type, form, padding, packed, dtype, tolerance, device):
    """Within two units in the last place of the largest entry, on inputs that the type represents
    exactly.

    On a GPU too by the torch forms: the kernels, whose products round more, have this test in
    test_triton.py.
    """
    problem = make_problem(
        mask_type, 65, padding, packed, ordered=packed, normalize=packed, dtype=dtype, device=device
    )
    check(problem, lion_attention, dtype, tolerance, form=form, chunk_size=16, backend="torch")


@pytest.mark.parametrize(
    "dtype, tolerance", [*EXACT, *HALF], ids=lambda x: str(x).removeprefix("torch.")
)
@pytest.mark.parametrize(
    "padding, ordered, normalize",
    [("none", True, True), ("interior", False, False), ("left", False, True)],
)
@pytest.mark.parametrize("feature_map", [name for name in FEATURES if name != "identity"])
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_feature_maps(
    mask_type, feature_map, padding, ordered, normalize, dtype, tolerance, device
):
    """As part of the operation: query and key before the map, their gradients too."""
    options = {"feature_map": feature_map, "dtype": dtype, "device": device}
    problem = make_problem(mask_type, 33, padding, False, ordered, normalize, **options)
    for form in FORMS:
        check(problem, lion_attention, dtype, tolerance, form=form, chunk_size=16, backend="torch")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    mask_type=st.sampled_from(MASK_TYPES),
    length=st.integers(1, 40),
    padding=st.sampled_from(PADDINGS),
    packed=st.booleans(),
    ordered=st.booleans(),
    normalize=st.booleans(),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    feature_map=st.sampled_from(list(FEATURES)),
    chunk_size=st.integers(1, 50),
)
def test_random_shapes(chunk_size, **case):
    problem = make_problem(**case)
    for form in FORMS:
        check(problem, lion_attention, torch.float64, 1e-10, form=form, chunk_size=chunk_size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_gradcheck(mask_type, form):
    """Analytic against numeric derivatives, through padding, two documents and the divisor."""
    problem = make_problem(
        mask_type,
        7,
        "interior",
        packed=True,
        normalize=True,
        batch=1,
        heads=2,
        head_dim=2,
        value_dim=2,
    )
    names = list(problem.inputs)

    def function(*tensors):
        return lion_attention(
            **dict(zip(names, tensors)), **problem.options, form=form, chunk_size=3
        )

    assert torch.autograd.gradcheck(function, tuple(problem.inputs.values()))


@pytest.mark.parametrize("form", FORMS)
def test_edge_decays(form):
    """A pair of edge decays is the general operation.

    The gates' edges written out give the same as the gates.
    """
    problem = make_problem("selective", 21)
    gates = problem.inputs["log_decay"]
    edges = (
        gates,
        torch.cat([gates[..., 1:], gates[..., :1]], dim=-1),
    )  # the last entry belongs to no edge
    inputs = [problem.inputs[name] for name in ("query", "key", "value")]
    output = lion_attention(*inputs, edges, form=form, chunk_size=4, scale=0.5)
    torch.testing.assert_close(output, problem.expected["output"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_two_directions_are_apart(form):
    """Closing all edges from right to left leaves a causal operation, and the other way round."""
    query, key, value = (torch.randn(1, 2, 9, 3, dtype=torch.float64) for _ in range(3))
    open_edges, closed = torch.zeros(1, 2, 9), torch.full((1, 2, 9), float("-inf"))
    scores = query @ key.mT * 3**-0.5
    causal = lion_attention(query, key, value, (open_edges, closed), form=form, chunk_size=4)
    torch.testing.assert_close(causal, scores.tril() @ value)
    reverse = lion_attention(query, key, value, (closed, open_edges), form=form, chunk_size=4)
    torch.testing.assert_close(reverse, scores.triu() @ value)


@pytest.mark.parametrize("form", FORMS)
def test_the_oracle_can_fail(form):
    """The grid's premise: gates, padding and documents each change the numbers.

    They change them by far more than its tolerance.
    """
    problem = make_problem("selective", 17, "interior", packed=True)
    for drop in ("log_decay", "attention_mask", "seq_idx"):
        broken = make_problem("selective", 17, "interior", packed=True)
        broken.inputs, broken.options = dict(problem.inputs), dict(problem.options)
        broken.expected = {"output": problem.expected["output"]}
        broken.weight = problem.weight
        broken.inputs.pop(drop, None)
        broken.options.pop(drop, None)
        with pytest.raises(AssertionError, match="output: error"):
            check(broken, lion_attention, torch.float64, 1e-2, form=form, chunk_size=4)
