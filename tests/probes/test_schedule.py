"""Which steps are sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import torchprobe
from torchprobe.arguments import check_count
from torchprobe.probes.schedule import AndBefore, Cadence, as_schedule, every, window
from torchprobe.testing import MemoryWriter


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


@given(st.integers(1, 200), st.booleans(), st.integers(0, 200))
@example(steps=7, dense=True, step=8)  # 10 is no dense step where each 7th is sampled
def test_the_next_step_is_the_first_one_sampled_from_there_on(steps, dense, step):
    cadence = Cadence(steps, dense)
    following = cadence.next(step)
    assert following >= step
    assert cadence(following)
    assert not any(map(cadence, range(max(step, 1), following)))


def test_a_default_cadence_begins_densely_and_a_given_one_does_not():
    assert sampled(torchprobe.Gradients().schedule, 250) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert sampled(torchprobe.Gradients(every=100).schedule, 250) == [1, 100, 200]
    assert sampled(torchprobe.Histograms().schedule, 1000) == [1, 500, 1000]
    assert sampled(type("Tenth", (torchprobe.Gradients,), {"default_every": 10})().schedule, 25) == [1, 2, 5, 10, 20]
    assert sampled(torchprobe.LearningRates().schedule, 4) == [1, 2, 3, 4]


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


def test_what_costs_nothing_is_written_at_its_own_cadence_too():
    model, writer = torch.nn.Linear(4, 1), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.LearningRates(every=10)]):
        for _ in range(25):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    assert [step for step, _ in writer.scalars("lr/SGD/group_0")] == [1, 10, 20]


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [
        (Cadence(100, dense=True), [1, 2, 4, 5, 9, 10, 19, 20, 49, 50, 99, 100, 199, 200]),
        (Cadence(100), [1, 99, 100, 199, 200]),
        (Cadence(3), [step for step in range(1, 201) if step % 3 != 1 or step == 1]),
        (Cadence(2), [*range(1, 201)]),
        (Cadence(1), [*range(1, 201)]),
    ],
)
def test_each_step_of_a_cadence_and_the_one_before_it(cadence, steps):
    assert sampled(AndBefore(cadence), 200) == steps
    for step in range(200):
        assert AndBefore(cadence).next(step) == min(s for s in steps if s >= step)
