"""What tests of times share."""

from __future__ import annotations

import pytest

from tests.probes.timed import Clock, Run
from torchprobe.capture import gate


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(gate, "perf_counter", made)
    return made


@pytest.fixture
def run(clock):
    made = Run(clock)
    yield made
    made.session.detach()
