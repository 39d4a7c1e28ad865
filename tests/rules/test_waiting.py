"""When a run is said to wait between its steps: on records, by hand."""

from __future__ import annotations

from random import Random

import torchprobe
from torchprobe.records import Record


def record(step: int, **values) -> Record:
    """Two underscores stand for a slash."""
    return Record(step, 0.0, {tag.replace("__", "/"): value for tag, value in values.items()})


def timed(step, seconds, wait=None):
    waits = {} if wait is None else {"performance__input_wait_seconds": wait}
    return record(step, performance__step_seconds=seconds, **waits)


def fired_of(times) -> list[int]:
    """Steps at which waiting is said to hold. times: seconds of each step, and of the wait where it is sampled."""
    rule = torchprobe.InputBound().watcher()
    return [step for step, one in enumerate(times, 1) if rule(timed(step, *one))]


SAMPLED = (2, 4, 5, 9, 10, 19, 20, 49, 50, 99, 100)  # by default, where the wait is known


def of_steps(waits, seconds=0.1, last=110) -> list[tuple[float, ...]]:
    """Seconds of each step, and of the wait where one is given."""
    return [(seconds, waits[step]) if step in waits else (seconds,) for step in range(1, last + 1)]


def test_a_run_that_waits_for_its_input():
    assert fired_of(of_steps(dict.fromkeys(SAMPLED, 0.04))) == [49, 50, 99, 100]
    assert not fired_of(of_steps(dict.fromkeys(SAMPLED, 0.02)))
    assert not fired_of(of_steps(dict.fromkeys(SAMPLED, 0.0009), seconds=0.001))  # of a toy
    assert fired_of(of_steps(dict.fromkeys(range(2, 111), 0.04))) == [*range(9, 111)]  # every step is sampled
    assert not fired_of(of_steps({step: 0.04 * (step % 2) for step in SAMPLED}))  # every other batch is late
    assert not fired_of(of_steps({step: 0.04 * (step % 10 == 9) for step in SAMPLED}))


def test_a_cold_start_makes_no_run_wait():
    """The first ten batches fill a cache, and what is read later comes from there."""
    assert not fired_of(of_steps({step: 0.09 if step <= 10 else 0.001 for step in SAMPLED}))


def test_one_wait_may_be_enough():
    rule = torchprobe.InputBound(samples=1).watcher()
    assert rule(record(1, lr__SGD=0.1)) is None
    assert rule(timed(2, 0.1)) is None
    [alert] = rule(timed(3, 0.1, 0.05))
    assert (alert.rule, alert.where, alert.value, alert.threshold) == ("input_bound", None, 0.5, 0.3)
    assert "0.05 s of a step of 0.1 s" in alert.message


def test_what_is_done_in_sampled_steps_alone_makes_no_run_wait():
    """A checkpoint at every tenth step, just before it: the steps in between show that it is not the data."""
    assert not fired_of([(1.1, 1.01) if step % 10 == 9 else (0.1,) for step in range(100)])
    assert fired_of([(1.1, 1.01) if step % 10 == 9 else (1.1,) for step in range(100)])


def test_steps_that_a_coarse_clock_cannot_tell_are_no_measure():
    assert not fired_of(of_steps(dict.fromkeys(range(2, 111), 0.04), seconds=0.0))


def test_a_run_near_the_limit_does_not_come_and_go():
    of = Random(0)
    times = [(0.1, 0.1 * of.gauss(share, 0.05)) for share in (0.36, 0.28, 0.36, 0.28) for _ in range(50)]
    fired = fired_of(times)
    assert fired == [*range(fired[0], 201)]
    assert not set(fired_of([*times, *[(0.1, 0.015)] * 50])) & {*range(208, 251)}
    assert not fired_of([(0.1, 0.1 * of.gauss(0.25, 0.02)) for _ in range(200)])


def test_no_wait_is_said_to_be_longer_than_its_step():
    """Two of three steps are fast: what is usual is no measure of the one that waits, and is timed."""
    rule = torchprobe.InputBound().watcher()
    times = [(0.1,), (0.1,), (0.9, 0.85)] * 20
    found = [rule(timed(step, *one)) or [] for step, one in enumerate(times, 1)]
    [alert] = found[-1]
    assert "0.85 s of a step of 0.9 s" in alert.message
    assert 0.3 < alert.value < 1
