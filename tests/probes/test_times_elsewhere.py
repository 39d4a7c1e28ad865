"""Times of several ranks, and of devices that lag behind."""

from __future__ import annotations

import math

import pytest
import torch

import torchprobe
from tests.probes.timed import ALONE, KNOWN, PLAIN, Clock, Run
from torchprobe.capture import times


def row(**known) -> torch.Tensor:
    fields = torchprobe.Performance.fields
    values = {"ranks": 2.0, "parts": 1.0, "wall": 0.0, **known}
    return torch.tensor([values.get(name, math.nan) for name in fields], dtype=torch.float64)


def reported(*rows) -> dict[str, float]:
    found = torchprobe.Performance().report_all(["step"] * len(rows), torch.stack(rows).numpy())
    return {tag.removeprefix("performance/"): value for tag, value in found}


def test_ranks_have_the_largest_times_and_the_sum_of_rates():
    probe = torchprobe.Performance()
    a = row(step_seconds=1.0, forward_seconds=0.25, peak_memory_bytes=10.0, examples_per_second=8.0)
    b = row(step_seconds=2.0, peak_memory_bytes=9.0, examples_per_second=4.0, tokens_per_second=1.0)
    assert reported(probe.combine(a, b)) == {
        "step_seconds": 2.0,
        "peak_memory_bytes": 10.0,
        "examples_per_second": 12.0,
    }


def test_rates_of_some_ranks_alone_are_not_written():
    assert reported(row(step_seconds=1.0, examples_per_second=8.0)) == {"step_seconds": 1.0}


def test_ranks_that_see_the_same_examples_have_one_rate():
    a, b = row(step_seconds=1.0, tokens_per_second=8.0), row(step_seconds=2.0, tokens_per_second=4.0)
    assert reported(a, b) == {"step_seconds": 2.0, "tokens_per_second": 4.0}


class Lagging:
    """A device whose clock is the test's, and which has come no further than so many seconds before it."""

    device = torch.device("cuda", 0)

    def __init__(self, clock: Clock, lag: float) -> None:
        self.clock, self.lag = clock, lag

    def now(self) -> float:
        return self.clock.now

    def passed(self, mark: float) -> bool:
        return mark <= self.clock.now - self.lag

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def peak_memory(self) -> float:
        return 123.0


@pytest.fixture
def lagging(clock, monkeypatch):
    """A run on a device that lags behind by so many seconds."""

    def start(lag: float, **options) -> Run:
        monkeypatch.setattr(times, "_watch_of", lambda model, meter: Lagging(clock, lag))
        return Run(clock, **options)

    return start


@pytest.mark.parametrize("lag", [0.0, 14.0, 5 * 14.0])
def test_records_wait_in_order_until_the_device_has_come_to_the_end_of_a_timed_step(lagging, lag):
    run = lagging(lag)
    run.steps(8)
    assert run.session.step == 8
    run.steps(12)
    run.session.detach()
    steps = [step for step, _ in run.writer.scalars("overview/loss")]
    assert steps == list(range(1, 21))
    assert run.seconds("step") == dict.fromkeys(range(2, 21), PLAIN["step"])
    last = 20 - lag // 14  # the run ends before later ones can be read
    for name in ("forward", "backward", "optimizer"):
        assert run.seconds(name) == {step: PLAIN[name] for step in ALONE if step <= last}, name
    after_quiet = [4, 5, 9, 10, 19, 20]  # in step 1 other probes have given the device work
    assert run.seconds("input_wait") == {step: PLAIN["input_wait"] for step in after_quiet if step <= last}
    assert run.rates("examples") == dict.fromkeys(KNOWN, pytest.approx(8 / 14))
    assert {value for _, value in run.writer.scalars("performance/peak_memory_bytes")} == {123.0}


def test_a_device_that_never_comes_costs_its_times_alone(lagging):
    run = lagging(math.inf)
    run.steps(40)
    held = [record.step for record in run.writer.records]
    run.session.detach()
    assert max(held, default=0) <= 40
    assert [step for step, _ in run.writer.scalars("overview/loss")] == list(range(1, 41))
    assert not run.seconds("forward")
    assert run.seconds("step") == dict.fromkeys(range(2, 41), PLAIN["step"])


def test_a_device_has_done_our_work_where_the_step_before_was_sampled(lagging):
    run = lagging(0.0, probes=[torchprobe.Performance(every=3), torchprobe.Activations(every=2)])
    run.steps(14)
    run.session.detach()
    assert run.seconds("input_wait") == dict.fromkeys([6, 12], 5.0)
    assert run.seconds("forward") == dict.fromkeys([3, 9], 2.0)


def test_flushing_does_not_wait_for_a_device(lagging):
    run = lagging(30.0)
    run.steps(4)
    run.model(run.data())  # step 5 begins
    assert run.session.flush(10.0)
    assert run.writer.value("performance/step_seconds", step=4) == 14.0
    assert not run.seconds("forward")
    run.session.detach()
