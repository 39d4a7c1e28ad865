from __future__ import annotations

import threading

import pytest

from torchprobe.buffer.drain import Drain
from torchprobe.buffer.step import StepInFlight
from torchprobe.records import Record
from torchprobe.writers.protocol import MemoryWriter

PATIENCE = 30.0  # seconds after which a test gives up; nothing measures time


class SlowWriter(MemoryWriter):
    """Hangs in every `write` until `release` is set; `entered` says that it hangs."""

    def __init__(self):
        super().__init__()
        self.entered = threading.Event()
        self.release = threading.Event()

    def write(self, records):
        self.entered.set()
        assert self.release.wait(PATIENCE)
        super().write(records)


class FailingWriter(MemoryWriter):
    """Raises `error` from `write` while it is set; counts the attempts."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error
        self.attempts = 0

    def write(self, records):
        self.attempts += 1
        if self.error is not None:
            raise self.error
        super().write(records)


@pytest.fixture
def slow_writer(open_drain):  # released before its drain is closed
    writer = SlowWriter()
    yield writer
    writer.release.set()


@pytest.fixture
def failing_writer():
    return FailingWriter


def record_of(sealed):
    return Record(sealed.step, sealed.wall_time, dict(sealed.values))


@pytest.fixture
def step():
    """A step that has only host values."""
    return lambda number: StepInFlight(number, float(number), {"loss": number / 2})


@pytest.fixture
def to_record():
    """What turns such a step into a record."""
    return record_of


@pytest.fixture
def open_drain():
    """Makes drains, and ends them after the test."""
    drains = []

    def make(writer, decode=record_of, flush_seconds=3600.0):
        drains.append(Drain(writer, decode, flush_seconds))
        return drains[-1]

    yield make
    for drain in drains:
        drain.close(PATIENCE)


@pytest.fixture
def steps_in():
    """The steps that a writer has, in the order of writing."""
    return lambda writer: [record.step for record in writer.records]


@pytest.fixture
def in_thread():
    """Runs a call in another thread and returns what it returns; fails when it blocks."""

    def run(call, *args):
        results = []
        thread = threading.Thread(target=lambda: results.append(call(*args)), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the call blocks"
        return results[0]

    return run
