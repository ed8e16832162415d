"""λ(t) at the points where it is known by hand."""

import pytest

from ba_lora.objective.schedules import SCHEDULES, scheduled_weight


def at(name: str, *steps: int) -> list[float]:
    return [scheduled_weight(name, 2.0, step=step, num_steps=100) for step in steps]


def test_constant():
    assert at("constant", 0, 50, 99) == [2.0, 2.0, 2.0]


def test_adaptive_is_constant_in_time():
    assert at("adaptive", 0, 99) == [2.0, 2.0]


def test_cosine_falls_from_all_to_a_tenth():
    assert at("cosine_to_10_percent", 0, 50, 100) == pytest.approx([2.0, 0.2 + 0.9, 0.2])


def test_two_phase_is_silent_then_ramps_then_full():
    assert at("two_phase", 0, 19, 20) == pytest.approx([0, 0, 0])
    assert at("two_phase", 21, 22, 24, 25, 99) == pytest.approx([0.4, 0.8, 1.6, 2.0, 2.0])


def test_no_steps_at_all():
    assert all(scheduled_weight(name, 2.0, step=0, num_steps=0) in (0.0, 2.0) for name in SCHEDULES)


def test_unknown_schedule():
    with pytest.raises(KeyError):
        scheduled_weight("linear", 1.0, step=0, num_steps=1)
