"""Random and absurd arguments of the operation.

They give the right answer, or an error that names what is wrong.

The right answer is that of the definition in `oracle.py`. Everything that was found on the way is
an `@example`.
"""

import math

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.fuzzing import ABSURD, CASES, INF, NAN, fuzz, refused
from support.oracle import definition

from lion_hf import lion_attention
from lion_hf.modeling.configuration_lion import ATTENTION_FORMS

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def test_there_are_two_thousand_cases():
    assert sum(CASES.values()) >= 2000


# The operation


@st.composite
def problems(draw) -> tuple[dict, dict]:
    """Tensors and options of `lion_attention` that fit together.

    They are of any size, type, layout and extreme.
    """
    seed, dtype = draw(st.integers(0, 2**32)), draw(st.sampled_from(list(TOLERANCES)))
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length = (
        draw(st.integers(0, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 20)),
    )
    head_dim, value_dim = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    normalize, layout = (
        draw(st.booleans()),
        draw(st.sampled_from(("dense", "transposed", "expanded", "far apart", "one value"))),
    )

    def tensor(*shape):
        if layout == "transposed":
            x = torch.randn(
                *shape[:1], shape[2], shape[1], shape[3], generator=generator
            ).transpose(1, 2)
        elif layout == "expanded":
            x = torch.randn(1, 1, *shape[2:], generator=generator).expand(shape)
        elif layout == "far apart":
            x = torch.randn(*shape[:3], 7 * max(shape[3], 1), generator=generator)[..., ::7][
                ..., : shape[3]
            ]
        else:
            x = torch.randn(*shape, generator=generator)
        x = (
            torch.zeros_like(x) + draw(st.sampled_from((0.0, -0.0, 1e-30, 2.0)))
            if layout == "one value"
            else x
        )
        return x.to(dtype)

    inputs = {
        "query": tensor(batch, heads, length, head_dim),
        "key": tensor(batch, heads, length, head_dim),
    }
    inputs["value"] = tensor(batch, heads, length, value_dim)
    if normalize:
        inputs |= {name: inputs[name].abs() for name in ("query", "key")}
    options = {"normalize": normalize, "form": draw(st.sampled_from(ATTENTION_FORMS))}
    options["chunk_size"] = draw(st.sampled_from((None, 1, 2, 5, 64, 10**18, 10**30)))
    options["scale"] = draw(st.sampled_from((None, 0, 1.0, -0.5)))
    ordered, kind = (
        draw(st.booleans()),
        draw(st.sampled_from(("lit", "decay", "selective", "pair"))),
    )
    if kind != "lit":
        shape = (
            draw(st.sampled_from((1, batch))),
            draw(st.sampled_from((1, heads))),
            1 if kind == "decay" else length,
        )
        ordered = ordered and kind != "pair"
        many = (torch.rand(*((2,) * ordered), *shape, generator=generator) for _ in range(2))
        low = draw(st.sampled_from((-1e-3, -1.0, -30.0, -1e30, -INF)))
        gates = [torch.where(x < 0.3, 0.0, torch.where(x > 0.7, low, -x)).to(dtype) for x in many]
        inputs["log_decay"] = tuple(gates) if kind == "pair" else gates[0]
    mask = draw(st.sampled_from((None, "random", "all padding", "one token", "no padding")))
    if mask is not None:
        keep = torch.rand(batch, length, generator=generator) < {
            "all padding": 0.0,
            "random": 0.6,
        }.get(mask, 1.1)
        keep = torch.zeros_like(keep) if mask == "one token" else keep
        if mask == "one token" and length:
            keep[:, draw(st.integers(0, length - 1))] = True
        options["attention_mask"] = keep.to(
            draw(st.sampled_from((torch.bool, torch.int64, torch.uint8, torch.float32)))
        )
    if draw(st.booleans()):
        shape = (1 if ordered or draw(st.booleans()) else batch, length)
        options["seq_idx"] = (torch.rand(shape, generator=generator) < 0.2).long().cumsum(-1)
    if ordered and length:
        documents = options["seq_idx"][0] if "seq_idx" in options else torch.zeros(length)
        orders = [
            (documents + torch.rand(length, generator=generator) * 0.9).argsort() for _ in range(2)
        ]
        options["order"] = torch.stack(orders)
    elif ordered and kind != "lit":
        inputs["log_decay"] = inputs["log_decay"][0]
    return inputs, options


def simple(**changes) -> tuple[dict, dict]:
    """A small problem with changes, for the examples."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(2, 3, 9, 4) for name in ("query", "key", "value")}
    inputs["log_decay"] = -torch.rand(2, 3, 9)
    inputs |= {name: changes.pop(name) for name in list(changes) if name in inputs}
    return inputs, {
        "form": "auto",
        "normalize": False,
        "chunk_size": None,
        "scale": None,
        **changes,
    }


def cut(*shape, **changes):
    problem = simple(form="chunk", **changes)
    slices = tuple(slice(n) for n in shape)
    return {name: x[slices[: x.dim()]] for name, x in problem[0].items()}, problem[1]


@fuzz("values")
@given(problems())
@example(cut(0, 3, 9, 4))  # the chunk form failed on empty batches, heads and values
@example(cut(2, 0, 9, 4))
@example(({**simple()[0], "value": torch.ones(2, 3, 9, 0)}, {**simple()[1], "form": "chunk"}))
@example(simple(form="chunk", chunk_size=10**30))
@example(simple(attention_mask=torch.zeros(2, 9), normalize=True))
@example(
    cut(2, 3, 0, 4, attention_mask=torch.ones(2, 0), seq_idx=torch.zeros(1, 0, dtype=torch.long))
)  # raised IndexError
@example(simple(log_decay=torch.full((2, 3, 9), -INF), form="recurrent"))
def test_the_operation_gives_what_its_definition_gives(problem):
    inputs, options = problem
    found = lion_attention(**inputs, **options)
    dtype = inputs["value"].dtype
    assert found.dtype == dtype and torch.isfinite(found).all()
    exact = {
        name: tuple(y.double() for y in x) if isinstance(x, tuple) else x.double()
        for name, x in inputs.items()
    }
    gates, order, mask = (
        exact.pop("log_decay", None),
        options.get("order"),
        options.get("attention_mask"),
    )
    batch, heads, length, head_dim = exact["query"].shape
    scale = head_dim**-0.5 if options["scale"] is None else options["scale"]
    documents = options.get("seq_idx")
    if isinstance(gates, tuple):
        expected = of_edges(
            **exact,
            edges=gates,
            mask=mask,
            seq_idx=documents,
            scale=scale,
            normalize=options["normalize"],
        )
    elif batch * length == 0:
        expected = torch.zeros(found.shape)
    else:
        gates = gates if gates is None or order is not None else gates[None]
        expected = definition(
            **exact,
            log_decay=gates,
            mask=mask,
            seq_idx=documents,
            order=order,
            scale=scale,
            normalize=options["normalize"],
        )
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double(), expected.double(), atol=TOLERANCES[dtype] * size, rtol=TOLERANCES[dtype]
    )


def of_edges(query, key, value, edges, mask, seq_idx, scale, normalize) -> torch.Tensor:
    """The definition for decays of edges, one weight at a time.

    Padding is transparent, but its edges decay.
    """
    batch, heads, length, _ = query.shape
    forward, backward = (x.exp().expand(batch, heads, length) for x in edges)
    keep = torch.ones(batch, length) if mask is None else (mask != 0).double()
    documents = torch.zeros(batch, length) if seq_idx is None else seq_idx.expand(batch, length)
    weights = torch.zeros(batch, heads, length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(length):
            low, high = min(i, j), max(i, j)
            decay = (forward if j < i else backward)[..., low:high].prod(-1)
            together = (documents[:, i] == documents[:, j]) * keep[:, i] * keep[:, j]
            weights[..., i, j] = (
                decay * together[:, None] * (query[:, :, i] * key[:, :, j]).sum(-1) * scale
            )
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return weights @ value


DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
WRONG = st.builds(
    lambda shape, dtype, device, fill: torch.full(shape, fill).to(device, dtype),
    st.lists(st.sampled_from((0, 1, 2, 3, 4, 9)), max_size=5),
    st.sampled_from((*DTYPES, torch.float8_e4m3fn)),
    st.sampled_from(("cpu", "cpu", "meta")),
    st.sampled_from((0.0, 1.0, -1.0, 100.0, -1e30, NAN, INF)),
)
ARGUMENTS = (
    "query",
    "key",
    "value",
    "log_decay",
    "attention_mask",
    "seq_idx",
    "order",
    "scale",
    "normalize",
    "eps",
    "dropout_p",
    "form",
    "chunk_size",
    "backend",
)
NAMED = "|".join((*ARGUMENTS, "boundar"))
META = torch.ones(2, 3, 9, 4, device="meta")
ONE_ORDER = {"log_decay": -torch.ones(1, 2, 3, 9)}


@fuzz("arguments")
@given(
    st.dictionaries(st.sampled_from(ARGUMENTS), ABSURD | WRONG, min_size=1, max_size=2),
    st.sampled_from(ATTENTION_FORMS),
)
@example({"query": META}, "attention")  # gave memory as it was
@example({"attention_mask": torch.ones(2, 9, device="meta")}, "auto")
@example({"log_decay": torch.full((2, 3, 9), 100.0)}, "chunk")  # gave NaN
@example({"log_decay": torch.ones(2, 3, 9, dtype=torch.complex64)}, "auto")
@example({"log_decay": torch.ones(2, 3, 9, dtype=torch.bool)}, "auto")
@example({"attention_mask": -torch.ones(2, 9, dtype=torch.long)}, "auto")  # were read as tokens
@example({"attention_mask": torch.full((2, 9), NAN)}, "auto")
@example({"seq_idx": torch.rand(2, 9)}, "auto")
@example(
    {**ONE_ORDER, "order": torch.zeros(1, 9, dtype=torch.long)}, "attention"
)  # gave a wrong sum
@example({**ONE_ORDER, "order": torch.arange(9)[None] + 1}, "recurrent")
@example({**ONE_ORDER, "order": torch.arange(9.0)[None]}, "chunk")
@example(
    {"log_decay": -torch.ones(0, 2, 3, 9), "order": torch.ones(0, 9, dtype=torch.long)}, "chunk"
)
@example({"scale": NAN}, "auto")
@example({"scale": torch.tensor(0.5)}, "auto")
@example(
    {"eps": 0.0, "normalize": True, "attention_mask": torch.zeros(2, 9)}, "auto"
)  # divided 0 by 0
@example({"eps": None}, "auto")
@example({"dropout_p": "x"}, "auto")
@example({"query": [[1]]}, "auto")
@example({"query": torch.ones(2, 3, 9, 4).to_sparse()}, "auto")
@example({"value": torch.ones(2, 3, 9, 4).to(torch.float8_e4m3fn)}, "auto")
@example({"normalize": "no"}, "auto")
def test_absurd_arguments_are_named(changes, form):
    inputs, options = simple(form=form)
    arguments = {**inputs, **options, **changes}
    outcome = []
    if refused(lambda: outcome.append(lion_attention(**arguments)), NAMED):
        return
    found = outcome[0]
    known = all(x is None or not torch.is_tensor(x) or x.isfinite().all() for x in changes.values())
    assert found.shape == arguments["value"].shape and found.dtype == arguments["value"].dtype
    assert found.device == arguments["query"].device
    gates = arguments["log_decay"]
    if (
        known
        and not arguments["normalize"]
        and arguments["dropout_p" if "dropout_p" in arguments else "chunk_size"] is None
    ):
        same = lion_attention(**{**arguments, "form": "recurrent"})
        torch.testing.assert_close(found, same, atol=1e-2, rtol=1e-2)
    assert gates is None or gates[0].numel() == 0 or not (gates > 0).any()


@fuzz("isolation")
@given(
    st.sampled_from(("query", "key", "value", "log_decay")),
    st.sampled_from((NAN, INF, -INF)),
    st.integers(0, 8),
    st.sampled_from(ATTENTION_FORMS),
    st.booleans(),
    st.sampled_from((None, 3)),
)
def test_what_is_not_finite_stays_in_its_row_and_head(
    name, bad, place, form, normalize, chunk_size
):
    inputs, options = simple(form=form, normalize=normalize, chunk_size=chunk_size)
    inputs |= {n: inputs[n].abs() for n in ("query", "key")}
    expected = lion_attention(**inputs, **options)
    inputs[name] = inputs[name].clone()
    inputs[name][0, 1, place] = bad
    if name == "log_decay" and bad == INF:
        assert refused(lambda: lion_attention(**inputs, **options), "log_decay")
        return
    found = lion_attention(**inputs, **options)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    torch.testing.assert_close(found[others], expected[others], atol=1e-5, rtol=1e-5)
    if math.isnan(bad) and name == "value":
        assert not found[0, 1].isfinite().all()  # and it is not hidden
    mask = torch.ones(2, 9)
    mask[0, place] = 0
    assert lion_attention(**inputs, **options, attention_mask=mask).isfinite().all()
