"""What torchprobe says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from torchprobe.buffer import outlet
from torchprobe.buffer.outlet import Overview


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is set."""
    clock = [100.0]
    monkeypatch.setattr(outlet, "monotonic", lambda: clock[0])
    return clock


def of(meter):
    return Overview(SimpleNamespace(drain=SimpleNamespace(dropped=2), decoder=SimpleNamespace(skipped=1)), meter)


def test_the_overhead_is_a_share_of_the_time_since_the_last_report(now):
    meter = SimpleNamespace(seconds=5.0)
    shown = of(meter)
    now[0], meter.seconds = 110.0, 6.0
    assert shown.values(3) == {
        "overview/probe_overhead": pytest.approx(0.1),
        "overview/dropped_records": 2.0,
        "overview/skipped_steps": 4.0,
    }
    now[0], meter.seconds = 120.0, 6.2
    assert shown.values(3)["overview/probe_overhead"] == pytest.approx(0.02)


def test_the_end_right_after_a_report_does_not_claim_all_of_the_time(now):
    meter = SimpleNamespace(seconds=0.0)
    shown = of(meter)
    now[0], meter.seconds = 110.0, 1.0
    shown.values(0)
    now[0], meter.seconds = 110.001, 1.02  # the last step's own share comes behind its report
    assert shown.values(0).keys() == {"overview/dropped_records", "overview/skipped_steps"}
    now[0], meter.seconds = 120.0, 2.0
    assert shown.values(0)["overview/probe_overhead"] == pytest.approx(0.1)
