"""Rows of many short documents on a CPU, each of which becomes a row of its own."""

import pytest
import torch
from torch.nn import functional as F

from lion_hf import lion_attention
from lion_hf.modeling import lion_torch
from lion_hf.modeling.lion_documents import batches_of

# One token, several of about the same length, one as long as a chunk, one of two chunks.
LENGTHS = [40, 1, 38, 256, 9, 300, 41, 12, 9]
DECAYS = ("none", "constant", "selective")


def problem(decays: str, orders: int, rows: int = 1) -> tuple[list, torch.Tensor, dict]:
    """Inputs in float64, the output's gradient, and what says where documents are."""
    torch.manual_seed(0)
    length = sum(LENGTHS)
    tensors = [torch.randn(rows, length, 2, size).transpose(1, 2) for size in (4, 4, 3, 3)]
    *inputs, grad = [x.double() for x in tensors]
    shape = (rows, 2, length) if decays == "selective" else (1, 2, 1)
    order = None
    if orders > 1:  # every order reads the documents in another sequence
        documents = torch.arange(length).split(LENGTHS)
        order = torch.stack(
            [
                torch.cat(
                    [
                        documents[n][torch.randperm(LENGTHS[n])]
                        for n in torch.randperm(len(LENGTHS)).tolist()
                    ]
                )
                for _ in range(orders)
            ]
        )
        shape = orders, *shape
    if decays != "none":
        inputs.append(F.logsigmoid(torch.randn(shape).double() + 1))
    seq_idx = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    return inputs, grad, {"seq_idx": seq_idx, "order": order}


def results(inputs: list, grad: torch.Tensor, **options) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = lion_attention(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.fixture
def laid_out(monkeypatch) -> list[bool]:
    """Whether each call of the chunk form took its documents apart, those of batches included."""
    calls, rows = [], lion_torch.document_rows

    def watched(request):
        found = rows(request)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(lion_torch, "document_rows", watched)
    return calls


@pytest.mark.parametrize("chunk_size", (None, 16))
@pytest.mark.parametrize(
    "feature_map, normalize", [("normalized_silu", True), ("elu_plus_one", False)]
)
@pytest.mark.parametrize("orders, rows", [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("decays", DECAYS)
def test_output_and_every_gradient(
    decays, orders, rows, feature_map, normalize, chunk_size, laid_out
):
    inputs, grad, options = problem(decays, orders, rows)
    options |= {"feature_map": feature_map, "normalize": normalize}
    expected = results(inputs, grad, form="attention", **options)
    found = results(inputs, grad, form="chunk", chunk_size=chunk_size, **options)
    assert laid_out == [True]
    for x, y in zip(found, expected):
        assert (x - y).abs().max() <= 1e-9 * y.abs().max()


def test_half_precision(laid_out):
    inputs, _, options = problem("selective", 2)
    expected = lion_attention(*inputs, form="attention", **options)
    *operands, gates = inputs
    half = [x.bfloat16() for x in operands]
    output = lion_attention(*half, gates.float(), form="chunk", **options)
    assert laid_out == [True] and output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.02 * expected.norm()


def test_second_derivatives_and_many_gradients_at_once(laid_out):
    inputs, grad, options = problem("selective", 2)
    options |= {"feature_map": "normalized_silu", "normalize": True}
    answers = []
    for form in ("attention", "chunk"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = lion_attention(*leaves, form=form, **options)
        many = torch.autograd.grad(
            output, leaves, torch.stack([grad, -2 * grad]), is_grads_batched=True, retain_graph=True
        )
        first = torch.autograd.grad(output, leaves, grad, create_graph=True)
        total = sum(x.square().sum() for x in first)
        answers.append([*many, *torch.autograd.grad(total, leaves)])
    assert laid_out and laid_out[0]
    for x, y in zip(*answers):
        assert (x - y).abs().max() <= 1e-9 * y.abs().max()


def test_what_is_read_as_one_row(laid_out):
    inputs, grad, options = problem("selective", 1)
    long = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None] // 5
    for change in (
        {"seq_idx": long},  # documents of two chunks on average
        {"seq_idx": torch.zeros_like(long)},  # one document
        {"attention_mask": torch.ones_like(long)},
    ):
        given = {**options, **change}
        expected = results(inputs, grad, form="attention", **given)
        for x, y in zip(results(inputs, grad, form="chunk", **given), expected):
            assert (x - y).abs().max() <= 1e-9 * y.abs().max()
    assert laid_out == [False, False, False]


def test_a_document_that_is_not_finite_stays_alone():
    inputs, _, options = problem("selective", 2)
    expected = lion_attention(*inputs, form="chunk", **options)
    inputs[2][:, :, :40] = torch.nan  # the first document, whose tokens are read in place of none
    output = lion_attention(*inputs, form="chunk", **options)
    assert output[:, :, :40].isnan().all()
    torch.testing.assert_close(output[:, :, 40:], expected[:, :, 40:])


def test_documents_of_about_the_same_length_are_together():
    lengths = [144, 10, 126, 125, 36, 3, 29, 28]
    assert batches_of(lengths) == [[0, 2], [3], [4, 6, 7], [1, 5]]
