"""The boundary around a probe: what it costs, and that a failure stays inside."""

from __future__ import annotations

import itertools

from torchprobe.capture import gate
from torchprobe.capture.gate import Gate, Meter


def test_time_inside_a_boundary_inside_another_counts_once(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(gate, "perf_counter", lambda: float(next(seconds)))
    meter = Meter()
    with Gate("outer", meter).boundary(), Gate("inner", meter).boundary():
        pass
    assert meter.seconds == 1
    with Gate("again", meter).boundary():
        pass
    assert meter.seconds == 2


def test_a_failure_inside_is_counted_and_ends_the_counting(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(gate, "perf_counter", lambda: float(next(seconds)))
    meter = Meter()
    failing = Gate("failing", meter)
    with Gate("outer", meter).boundary(), failing.boundary():
        raise ValueError("inside")
    assert failing.failed
    assert meter.seconds == 1
