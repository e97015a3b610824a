"""The loss of masked language models beside that of transformers."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForMaskedLMLoss

from lion_hf import LionConfig, LionForMaskedLM
from lion_hf.modeling import lion_loss
from lion_hf.modeling.lion_loss import classification_loss, masked_lm_loss

ROWS, WORDS = 23, 11


@pytest.fixture(params=[1, 40, 2**18], ids=["row by row", "three rows", "all rows"])
def pieces(request, monkeypatch):
    """Rows that are computed at a time."""
    monkeypatch.setattr(lion_loss, "LOGITS_AT_A_TIME", request.param)


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, some far from 0, and labels, some of which do not count."""
    torch.manual_seed(0)
    logits, labels = 20 * torch.randn(ROWS, WORDS), torch.randint(WORDS, (ROWS,))
    labels[::4] = -100
    return logits.to(dtype).requires_grad_(), labels


def loss_and_gradient(loss, logits, labels, **options):
    value = loss(logits, labels, WORDS, **options)
    return value.detach(), torch.autograd.grad(3 * value, logits)[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("items", (None, 5, torch.tensor(40)))
def test_value_and_gradient(items, dtype, pieces):
    logits, labels = problem(dtype)
    options = {"num_items_in_batch": items}
    expected = loss_and_gradient(ForMaskedLMLoss, logits, labels, **options)
    found = loss_and_gradient(masked_lm_loss, logits, labels, **options)
    assert found[1].dtype == dtype
    torch.testing.assert_close(found, expected)
    assert (found[1][labels == -100] == 0).all()


def test_other_ignored_labels_and_shapes(pieces):
    logits, labels = problem()
    labels[labels == -100] = 3
    shaped = logits.view(1, ROWS, WORDS), labels.view(1, ROWS)
    expected = ForMaskedLMLoss(*shaped, WORDS, ignore_index=3)
    torch.testing.assert_close(masked_lm_loss(*shaped, WORDS, ignore_index=3), expected)


def test_second_derivatives(pieces):
    logits, labels = problem()

    def curvature(loss) -> torch.Tensor:
        value = loss(logits / 20, labels, WORDS)
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), logits)[0]

    torch.testing.assert_close(curvature(masked_lm_loss), curvature(ForMaskedLMLoss))


def test_transforms_and_many_gradients():
    logits, labels = problem()
    expected = loss_and_gradient(ForMaskedLMLoss, logits, labels)[1] / 3
    found = torch.func.grad(lambda x: masked_lm_loss(x, labels, WORDS))(logits.detach())
    torch.testing.assert_close(found, expected)
    value = masked_lm_loss(logits, labels, WORDS)
    (many,) = torch.autograd.grad(value, logits, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(many, torch.stack([expected, 2 * expected]))


def test_logits_that_are_not_finite_show_in_loss_and_gradient(pieces):
    logits, labels = problem()
    logits = logits.detach()
    logits[1, 0] = float("nan")
    value, gradient = loss_and_gradient(masked_lm_loss, logits.requires_grad_(), labels)
    assert value.isnan() and gradient[1].isnan().all() and gradient[2].isfinite().all()


def test_a_target_of_minus_100_is_a_number_like_any_other():
    """Only classes have a number that stands for "no label"."""
    logits, targets = torch.randn(4, 1), torch.tensor([-100.0, 3.0, 20.0, -100.0])
    found = classification_loss(logits, targets, "regression")
    torch.testing.assert_close(found, F.mse_loss(logits[:, 0], targets))


def test_models_take_it_and_let_users_replace_it():
    config = LionConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    model = LionForMaskedLM(config).eval()
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same.loss_function is masked_lm_loss
    labels = torch.randint(WORDS, (2, 5))
    batch = {"input_ids": labels, "labels": labels}
    expected = ForMaskedLMLoss(model(**batch).logits, labels, WORDS)
    torch.testing.assert_close(model(**batch).loss, expected)
    model.loss_function = lambda **given: given["logits"].sum()
    assert torch.equal(model(**batch).loss, model(**batch).logits.sum())
