"""States at the borders of pieces: against the definition, split anywhere, with every gradient."""

import pytest
import torch

from lion_hf.modeling.configuration_lion import FORMS
from lion_hf.modeling.lion_borders import (
    PieceStates,
    attend_in_piece,
    state_to_the_left,
    state_to_the_right,
)
from lion_hf.modeling.lion_naive import recurrent
from lion_hf.modeling.lion_request import directions_of

LENGTH, SCALE = 23, 0.3
FAMILIES = ("lit", "decay", "selective", "gates of 0 and 1")
CUTS = (0, 1, 9, 22, LENGTH)


def problem(family: str, dtype: torch.dtype = torch.float64) -> tuple:
    """Query, key, value and log-decays of a row."""
    query, key = torch.randn(2, 2, 3, LENGTH, 4, dtype=dtype)
    value = torch.randn(2, 3, LENGTH, 5, dtype=dtype)
    gates = {
        "lit": None,
        "decay": torch.rand(1, 3, 1, dtype=dtype),
        "selective": torch.rand(2, 3, LENGTH, dtype=dtype),
        "gates of 0 and 1": torch.randint(0, 2, (2, 3, LENGTH)).to(dtype),
    }[family]
    return query, key, value, None if gates is None else gates.log()


def part(tensors: tuple, start: int, end: int) -> list:
    """A piece of a problem."""
    *operands, log_decay = tensors
    pieces = [x[:, :, start:end] for x in operands]
    constant = log_decay is None or log_decay.shape[-1] == 1
    return [*pieces, log_decay if constant else log_decay[..., start:end]]


def whole(query, key, value, log_decay) -> torch.Tensor:
    """The definition's recurrent form on the whole row."""
    if log_decay is not None:
        log_decay = log_decay.clamp(min=-800).expand(-1, -1, LENGTH)
    directions = directions_of(log_decay, None, None, None, LENGTH, query.dtype)[0]
    return recurrent(query, key, value, directions.left_to_right, directions.right_to_left, SCALE)


def in_pieces(tensors: tuple, cuts: tuple[int, ...], **options) -> torch.Tensor:
    """The same from pieces between cuts, with the states carried from piece to piece."""
    pieces = [part(tensors, *ends) for ends in zip(cuts, cuts[1:])]
    left, right = None, None
    from_left, from_right = [], []
    for piece in pieces:
        from_left.append(left)
        own = state_to_the_right(*piece[1:])
        left = own if left is None else left.then(own)
    for piece in reversed(pieces):
        from_right.append(right)
        own = state_to_the_left(*piece[1:])
        right = own if right is None else right.then(own)
    around = map(PieceStates, from_left, reversed(from_right))
    outputs = [attend_in_piece(*x, y, scale=SCALE, **options) for x, y in zip(pieces, around)]
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_is_what_the_definition_says(family):
    """Token by token, with the gates multiplied."""
    _, key, value, log_decay = problem(family)
    gates = torch.ones(2, 3, LENGTH, dtype=torch.float64)
    if log_decay is not None:
        gates = gates * log_decay.exp()
    outer = key[..., :, None] * value[..., None, :]
    right, left = torch.zeros(2, 2, 3, 4, 5, dtype=torch.float64)
    for t in range(LENGTH):
        right = (right + outer[:, :, t]) * gates[:, :, t, None, None]
        mirror = LENGTH - 1 - t
        left = (left + outer[:, :, mirror]) * gates[:, :, mirror, None, None]
    found = state_to_the_right(key, value, log_decay), state_to_the_left(key, value, log_decay)
    for state, expected in zip(found, (right, left)):
        torch.testing.assert_close(state.key_value, expected, atol=1e-12, rtol=0)
        if family == "lit":
            assert state.log_decay is None
        else:
            passed = state.log_decay.exp().expand(2, 3)
            torch.testing.assert_close(passed, gates.prod(-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("cut", CUTS[1:-1])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_two_parts_make_that_of_the_whole(family, cut):
    tensors = problem(family)
    first, second = part(tensors, 0, cut)[1:], part(tensors, cut, LENGTH)[1:]
    joined = (
        (state_to_the_right(*first).then(state_to_the_right(*second)), state_to_the_right),
        (state_to_the_left(*second).then(state_to_the_left(*first)), state_to_the_left),
    )
    for state, function in joined:
        expected = function(*tensors[1:])
        assert (expected.key_value != 0).any()
        torch.testing.assert_close(state.key_value, expected.key_value, atol=1e-12, rtol=0)
        if family != "lit":
            torch.testing.assert_close(state.log_decay, expected.log_decay, atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_between_states_give_the_row(family, form):
    tensors = problem(family)
    found = in_pieces(tensors, CUTS, form=form, chunk_size=4)
    torch.testing.assert_close(found, whole(*tensors), atol=1e-12, rtol=0)
    one_each = in_pieces(tensors, tuple(range(LENGTH + 1)), form=form)
    torch.testing.assert_close(one_each, whole(*tensors), atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_without_their_states_do_not(family):
    tensors = problem(family)
    pieces = [part(tensors, *ends) for ends in zip(CUTS, CUTS[1:])]
    alone = [attend_in_piece(*x, PieceStates(None, None), scale=SCALE) for x in pieces]
    assert (torch.cat(alone, dim=2) - whole(*tensors)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_single_precision_too(family, dtype):
    """Of values in half precision the states are in single precision."""
    tensors = problem(family, torch.float32)
    exact = whole(*(None if x is None else x.double() for x in tensors))
    found = in_pieces(tensors, CUTS)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    half = [None if x is None else x.to(dtype) for x in tensors[1:3]]
    assert state_to_the_left(*half, tensors[3]).key_value.dtype == torch.float32


@pytest.mark.parametrize("family", ["lit", "decay", "selective"])
def test_gradients_are_those_of_the_row(family):
    tensors = problem(family)
    given = [x for x in tensors if x is not None]
    for x in given:
        x.requires_grad_()
    weights = torch.randn(2, 3, LENGTH, 5, dtype=torch.float64)
    expected = torch.autograd.grad((whole(*tensors) * weights).sum(), given)
    found = torch.autograd.grad((in_pieces(tensors, CUTS) * weights).sum(), given)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=0)


def test_a_long_row_of_strong_decay_has_finite_states():
    """Where powers of the sums would leave float32, they are zeros."""
    key, value = torch.randn(2, 1, 2, 20_000, 4)
    log_decay = torch.full((1, 2, 1), -30.0)
    for function in (state_to_the_right, state_to_the_left):
        state = function(key, value, log_decay)
        assert state.key_value.isfinite().all() and state.log_decay.isfinite().all()
        assert torch.equal(state.then(state).key_value, state.key_value)


@pytest.mark.parametrize("function", [state_to_the_right, state_to_the_left])
@pytest.mark.parametrize("length", [1, 127, 128, 8192, 20_000])
def test_long_sums_lose_nothing(function, length):
    """Every token counts, in single precision, and in pieces that no block divides."""
    key = torch.rand(1, 2, length, 4) + 0.5
    value = torch.rand(1, 2, length, 5) + 0.5
    log_decay = -1e-3 * torch.rand(1, 2, length)
    exact = function(key.double(), value.double(), log_decay.double()).key_value
    found = function(key, value, log_decay).key_value
    assert ((found - exact).abs() / exact).max() < 5e-7
