"""Which steps are sampled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchprobe.arguments import check_count
from torchprobe.probes.schedule import as_schedule, every, window


def sampled(schedule, last):
    return [step for step in range(1, last + 1) if schedule(step)]


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [(1, [*range(1, 13)]), (5, [1, 5, 10]), (12, [1, 12]), (13, [1])],
)
def test_every_is_step_1_and_then_each_multiple(cadence, steps):
    assert sampled(every(cadence), 12) == steps


def test_a_window_includes_both_ends():
    assert sampled(window(3, 5), 12) == [3, 4, 5]
    assert sampled(window(4, 4), 12) == [4]


def test_a_cadence_may_be_a_number_or_any_callable():
    assert sampled(as_schedule("every", 4), 9) == [1, 4, 8]
    assert sampled(as_schedule("every", lambda step: step in (2, 7)), 9) == [2, 7]
    primes = window(2, 3)
    assert as_schedule("every", primes) is primes


@given(st.integers(1, 50), st.integers(0, 200))
def test_the_next_active_step_is_the_first_one_sampled_after_it(cadence, step):
    following = next_active(every(cadence), step)
    assert following > step
    assert every(cadence)(following)
    assert not any(map(every(cadence), range(step + 1, following)))


def test_no_next_active_step_within_the_horizon_is_none():
    assert next_active(window(1, 5), 5, horizon=1000) is None
    assert next_active(window(10, 10), 0, horizon=10) == 10
    assert next_active(window(10, 10), 0, horizon=9) is None


@pytest.mark.parametrize("value", [0, -3])
def test_a_cadence_below_1_is_refused_by_the_name_of_the_argument(value):
    with pytest.raises(ValueError, match=rf"^flush_every={value}: takes a whole number of steps, 1 or more"):
        check_count("flush_every", value)


@pytest.mark.parametrize("value", [True, 2.0, "5", None, np.float64(3)])
def test_what_is_no_whole_number_is_refused_by_type(value):
    with pytest.raises(TypeError, match=rf"^every=.*whole number of steps, 1 or more, not {type(value).__name__}$"):
        as_schedule("every", value)


def test_a_window_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match=r"last=3 is before first=4.*first <= last"):
        window(4, 3)
    with pytest.raises(ValueError, match="first=0"):
        window(0, 3)
    with pytest.raises(TypeError, match="last='end'"):
        window(1, "end")
