"""Losses of a copy against its source: hidden states."""

import pytest
import torch
from support.softmax_models import (
    TYPE_OF,
    as_softmax,
    inputs_of,
    softmax_model,
    without_second_token,
)

from lion_hf.linearize.families import HEADS
from lion_hf.linearize.losses import hidden_state_loss, state_scales

pytest_plugins = ["support.softmax_models"]  # its fixtures


def states(layers: int = 2) -> list[torch.Tensor]:
    """Hidden states of which the first dimension is far larger than the others."""
    size = torch.tensor([100.0, 1.0, 0.1])
    return [torch.randn(4, 9, 3) * size + 50 * size for _ in range(layers)]


def test_all_dimensions_count_alike():
    targets = states()
    scales = state_scales(targets, None)
    assert scales.shape == (2, 3)
    for n in range(3):
        wrong = [x.clone() for x in targets]
        for x in wrong:
            x[..., n] = x[..., n].mean()
        losses = hidden_state_loss(wrong, targets, scales, None)
        torch.testing.assert_close(losses, torch.full((2,), 1 / 3))


def test_padding_does_not_count():
    targets, tokens = states(), torch.ones(4, 9, dtype=torch.long)
    tokens[1, 5:] = tokens[2, :3] = 0
    wrong = [x + 0.1 * torch.randn_like(x) for x in targets]
    scales = state_scales(targets, tokens)
    expected = hidden_state_loss(wrong, targets, scales, tokens)
    for x in (*wrong, *targets):
        x[tokens == 0] = 1e4 * torch.randn(int((tokens == 0).sum()), 3)
    torch.testing.assert_close(state_scales(targets, tokens), scales)
    torch.testing.assert_close(hidden_state_loss(wrong, targets, scales, tokens), expected)


def test_a_constant_dimension_does_not_rule_the_loss():
    targets = [torch.cat([torch.randn(4, 9, 2), torch.ones(4, 9, 1)], dim=-1)]
    wrong = [x + 0.01 for x in targets]
    assert hidden_state_loss(wrong, targets, state_scales(targets, None), None) < 1


@pytest.mark.parametrize("architecture", [name for name in HEADS if "Multiple" not in name])
def test_a_copy_with_softmax_has_the_hidden_states_of_its_source(architecture, softmax):
    """In transformers' numbering, so that layer by layer they can be compared for every head."""
    teacher, inputs = softmax_model(architecture), inputs_of(architecture)
    if TYPE_OF[architecture] == "deit":
        without_second_token(teacher)
    student, tokens = as_softmax(teacher), inputs.get("attention_mask")
    with torch.no_grad():
        targets, found = (
            model(**inputs, output_hidden_states=True).hidden_states for model in (teacher, student)
        )
        scales = state_scales(targets, tokens)
        assert hidden_state_loss(found, targets, scales, tokens).max() < 1e-8
        student.base_model.layers[1].attention.o_proj.weight.mul_(2)
        worse = student(**inputs, output_hidden_states=True).hidden_states
    losses = hidden_state_loss(worse, targets, scales, tokens)
    assert losses[:2].max() < 1e-8 and losses[2] > 1e-4
