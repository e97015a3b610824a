"""Budgets in words, plans by the clock, and batches by their places: no model is needed."""

import pytest
import torch

from lion_hf.data.masking import pad_rows
from lion_hf.data.samples import SeededDataset
from lion_hf.linearize.batches import TOKENS, Batches
from lion_hf.linearize.budget import (
    Phase,
    Speed,
    Wishes,
    plan_by_clock,
    plan_by_steps,
    rate_at,
    seconds_of,
    words_of,
)
from lion_hf.linearize.settings import Distillation

USUAL = {"layers": 1e-3, "answers": 2e-3}
NOT_GIVEN = {"layers": None, "answers": None}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("20", 20), (" 1.5M ", 90)],
)
def test_times_in_words(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("seconds", "words"), [(7, "7 s"), (720, "12 min"), (5400, "1 h 30 min"), (7200, "2 h")]
)
def test_words_of_times(seconds, words):
    assert words_of(seconds) == words


def test_the_rate_rises_and_falls_to_zero():
    rates = [rate_at(n / 1000) for n in range(1001)]
    top = rates.index(max(rates))
    assert rates[0] == 0 and rates[-1] == 0 and max(rates) == 1 and 20 < top < 100
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_a_plan_ends_with_its_budget():
    speed = Speed({"layers": 0.1, "answers": 0.2}, measurement=2.0)
    phases = plan_by_clock(600.0, 5.0, speed, Wishes(NOT_GIVEN, USUAL))
    names = [(phase.stage, phase.trial) for phase in phases]
    for stage in ("layers", "answers"):
        assert names.count((stage, True)) == 3 and names.count((stage, False)) == 1
    first, last = (phase.end for phase in phases if not phase.trial)
    assert last < 600 - 2 - 0.03 * 600 + 1e-6
    assert (first - 5) / (first - 5 + last - first - 2) == pytest.approx(0.3)
    assert [phase.rate for phase in phases[:4]] == [1e-3, pytest.approx(1e-3 / 3), 3e-3, None]
    steps = {phase.steps for phase in phases if phase.trial and phase.stage == "layers"}
    assert steps == {int(0.02 * (first - 5) / 0.1)}  # as many for each rate


def test_a_given_rate_is_not_tried_and_a_stage_may_be_left_out():
    speed = Speed({"layers": 0.1, "answers": 0.2}, measurement=2.0)
    wishes = Wishes({"layers": None, "answers": 7e-4}, USUAL, layers=0.0)
    (phase,) = plan_by_clock(600.0, 5.0, speed, wishes)
    assert (phase.stage, phase.rate, phase.trial) == ("answers", 7e-4, False)


def test_slow_steps_leave_no_time_for_trials():
    speed = Speed({"layers": 5.0, "answers": 5.0}, measurement=2.0)
    phases = plan_by_clock(600.0, 5.0, speed, Wishes(NOT_GIVEN, USUAL))
    assert [(phase.stage, phase.rate) for phase in phases] == [*USUAL.items()]


def test_a_budget_without_time_for_a_step():
    speed = Speed({"layers": 30.0, "answers": 10.0}, measurement=4.0)
    with pytest.raises(
        ValueError, match=r"30.0 s on the layers and 10.0 s end to end.*at least (\d+)s"
    ) as error:
        plan_by_clock(60.0, 5.0, speed, Wishes(NOT_GIVEN, USUAL))
    enough = float(str(error.value).partition("at least ")[2].partition("s")[0])
    assert plan_by_clock(enough + 4, 5.0, speed, Wishes(NOT_GIVEN, USUAL))


def test_plans_by_steps():
    phases = plan_by_steps({"layers": 0, "answers": 5}, Wishes(NOT_GIVEN, USUAL))
    assert phases == [Phase("answers", 2e-3, steps=5)]
    assert [phases[0].is_over(n, 0.0, 1e9) for n in (0, 4, 5)] == [False, False, True]


def test_a_phase_by_the_clock():
    phase = Phase("answers", 1e-3, end=20.0)
    assert not phase.is_over(0, 10.0, 30.0)  # at least one step
    assert phase.is_over(5, 10.0, 19.8) and not phase.is_over(5, 10.0, 15.0)
    assert phase.progress(5, 10.0, 15.0) == pytest.approx(0.55)  # the middle of the next step


def rows(count: int) -> SeededDataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 64, (count,), generator=generator).tolist()
    return SeededDataset(
        [{"input_ids": torch.full((n,), place + 1)} for place, n in enumerate(lengths)]
    )


def collate(samples: list) -> dict[str, torch.Tensor]:
    return pad_rows([{"input_ids": row["input_ids"]} for row in samples], 0)


def first_tokens(batches: Batches, count: int, place=(0, 0)) -> list[list[int]]:
    found = []
    for _ in range(count):
        batch, place = batches.take(place)
        found.append(batch["input_ids"][:, 0].tolist())
    return found


@pytest.mark.parametrize("batch_size", [None, 8])
def test_batches_go_on_from_any_place(batch_size):
    data, place = rows(300), (0, 0)
    whole = first_tokens(Batches(data, collate, batch_size, seed=3), 40)
    for _ in range(25):
        _, place = Batches(data, collate, batch_size, seed=3).take(place)
    assert first_tokens(Batches(data, collate, batch_size, seed=3), 15, place) == whole[25:]
    assert first_tokens(Batches(data, collate, batch_size, seed=4), 40) != whole


def test_an_epoch_has_every_row_once_with_little_padding():
    data, place, seen, tokens, padding = rows(300), (0, 0), [], 0, 0
    batches = Batches(data, collate, None, seed=0)
    while place[0] == 0:
        batch, place = batches.take(place)
        assert batch["input_ids"].numel() <= TOKENS
        seen += batch["input_ids"][:, 0].tolist()
        tokens, padding = (
            tokens + batch["input_ids"].numel(),
            padding + (batch["input_ids"] == 0).sum().item(),
        )
    assert sorted(seen) == [*range(1, 301)] and padding < 0.1 * tokens


@pytest.mark.parametrize(
    ("given", "layers", "steps"),
    [
        ({"steps": 5}, False, (0, 5, 0)),  # text, which learns nothing from the first stage
        ({"steps": 5}, True, (300, 5, 0)),
        ({"layer_steps": 4}, False, (4, 300, 0)),
        ({"document_steps": 7}, False, (0, 300, 7)),
    ],
)
def test_steps_of_stages_that_were_not_named(given, layers, steps):
    found = Distillation(**given)
    assert tuple(found.stage_steps(layers).values()) == steps
    words = found.in_words(layers)
    assert ("on the layers" in words) == (steps[0] > 0) and f"{steps[1]} end to end" in words


def test_a_step_is_timed_on_the_most_tokens_and_not_on_the_longest_text():
    """The longest text of a pool is alone in its last batch here, which takes little time."""
    texts = [torch.full((n,), 1) for n in [32] * 320 + [200]]
    batches = Batches(SeededDataset([{"input_ids": x} for x in texts]), collate, None, seed=0)
    sizes, place = [], (0, 0)
    while place[0] == 0:
        batch, place = batches.take(place)
        sizes.append(batch["input_ids"].shape)
    assert (1, 200) in sizes and batches.largest()["input_ids"].shape == (32, 32)


def test_processes_share_the_rows():
    data = rows(64)
    found = [first_tokens(Batches(data, collate, 4, 0, n, 2), 8) for n in range(2)]
    assert not {*sum(found[0], [])} & {*sum(found[1], [])}
    assert len({*sum(found[0] + found[1], [])}) == 64
