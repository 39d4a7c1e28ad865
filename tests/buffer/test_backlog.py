"""What a failing disk delays, what is dropped, and that memory stays bounded."""

from __future__ import annotations

import logging

import pytest

from torchprobe.buffer import backlog as backlog_module
from torchprobe.buffer.backlog import Backlog
from torchprobe.records import Record
from torchprobe.writers.protocol import MemoryWriter


def record(step, size=1):
    return Record(step, float(step), {f"tag{i}": 0.0 for i in range(size)})


@pytest.fixture
def clock(monkeypatch):
    """The time that pauses are counted in: a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(backlog_module, "monotonic", lambda: now[0])
    return now


class Picky(MemoryWriter):
    """Takes a batch whole or not at all, and never one with a step of `bad`."""

    def __init__(self, bad, error):
        super().__init__()
        self.bad, self.error = set(bad), error

    def write(self, records):
        if self.bad & {record.step for record in records}:
            raise self.error
        super().write(records)


def test_records_are_written_in_one_batch_and_in_order(failing_writer, steps_in):
    writer = failing_writer()
    backlog = Backlog(writer)
    for step in range(5):
        backlog.add(record(step))
    assert backlog.write()
    assert backlog.write()
    assert writer.attempts == 1
    assert steps_in(writer) == [0, 1, 2, 3, 4]


def test_a_disk_that_heals_has_every_record_once_and_in_order(failing_writer, steps_in, clock, caplog):
    writer = failing_writer(OSError("disk full"))
    backlog = Backlog(writer)
    for step in range(3):
        backlog.add(record(step))
        assert not backlog.write(urgent=True)
    writer.error = None
    backlog.add(record(3))
    assert backlog.write(urgent=True)
    assert steps_in(writer) == [0, 1, 2, 3]
    assert backlog.dropped == 0
    logged, healed = caplog.records
    assert logged.exc_info
    assert logged.levelno == logging.ERROR
    assert healed.getMessage() == "writing works again: what was kept is written (0 records dropped so far)"


def test_pauses_between_attempts_grow_to_a_minute_and_start_anew_after_success(failing_writer, clock):
    writer = failing_writer(OSError("disk full"))
    backlog = Backlog(writer)
    assert backlog.pause() is None
    backlog.add(record(1))
    pauses = []
    for _ in range(9):
        attempts = writer.attempts
        assert not backlog.write()
        assert writer.attempts == attempts + 1
        pauses.append(backlog.pause())
        clock[0] += pauses[-1] / 2
        assert not backlog.write()  # too early
        assert writer.attempts == attempts + 1
        clock[0] += pauses[-1] / 2
        assert backlog.pause() == 0
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    writer.error = None
    assert backlog.write()
    assert backlog.pause() is None
    writer.error = OSError("full again")
    backlog.add(record(2))
    backlog.write()
    assert backlog.pause() == 1


def test_a_disk_that_never_heals_costs_the_oldest_records_and_they_are_counted(failing_writer, steps_in, monkeypatch):
    monkeypatch.setattr(backlog_module, "MAX_RECORDS", 3)
    writer = failing_writer(OSError("disk full"))
    backlog = Backlog(writer)
    for step in range(10):
        backlog.add(record(step))
        backlog.write()
    assert backlog.dropped == 7
    writer.error = None
    assert backlog.write(urgent=True)
    assert steps_in(writer) == [7, 8, 9]
    assert backlog.dropped == 7


def test_large_records_are_bounded_by_their_values(failing_writer, steps_in, monkeypatch):
    monkeypatch.setattr(backlog_module, "MAX_VALUES", 100)
    writer = failing_writer(OSError("disk full"))
    backlog = Backlog(writer)
    for step in range(10):
        backlog.add(record(step, size=40))
        backlog.write()
    writer.error = None
    backlog.write(urgent=True)
    assert steps_in(writer) == [8, 9]
    assert backlog.dropped == 8


def test_a_healthy_writer_takes_any_amount(monkeypatch):
    monkeypatch.setattr(backlog_module, "MAX_RECORDS", 3)
    monkeypatch.setattr(backlog_module, "MAX_VALUES", 5)
    writer = MemoryWriter()
    backlog = Backlog(writer)
    for step in range(10):
        backlog.add(record(step, size=10))
    assert backlog.write()
    assert len(writer.records) == 10
    assert backlog.dropped == 0


def test_a_record_larger_than_all_bounds_is_dropped_and_nothing_is_retried(failing_writer, monkeypatch):
    monkeypatch.setattr(backlog_module, "MAX_VALUES", 5)
    writer = failing_writer(OSError("disk full"))
    backlog = Backlog(writer)
    backlog.add(record(1, size=10))
    backlog.write()
    assert backlog.dropped == 1
    assert backlog.write()
    assert backlog.pause() is None
    assert writer.attempts == 1


def test_only_the_records_that_the_writer_cannot_take_are_dropped(steps_in, caplog):
    writer = Picky({2, 4}, TypeError("no such value"))
    backlog = Backlog(writer)
    for step in range(6):
        backlog.add(record(step))
    assert backlog.write()
    assert steps_in(writer) == [0, 1, 3, 5]
    assert backlog.dropped == 2
    assert backlog.pause() is None
    (logged,) = caplog.records
    assert "step 2" in logged.getMessage()
    assert logged.exc_info[0] is TypeError


def test_a_disk_that_fills_among_bad_records_loses_the_bad_ones_only(steps_in, clock):
    class Filling(Picky):
        full = True

        def write(self, records):
            super().write(records)
            if self.full and len(self.records) == 2:
                self._records.pop()
                raise OSError("disk full")

    writer = Filling({0}, ValueError("bad"))
    backlog = Backlog(writer)
    for step in range(4):
        backlog.add(record(step))
    assert not backlog.write()
    assert backlog.pause() == 1
    writer.full = False
    assert backlog.write(urgent=True)
    assert steps_in(writer) == [1, 2, 3]
    assert backlog.dropped == 1


def test_closing_counts_and_reports_what_is_given_up(failing_writer, caplog):
    writer = failing_writer(OSError("disk full"))
    backlog = Backlog(writer)
    backlog.add(record(1)), backlog.add(record(2))
    backlog.write()
    assert not backlog.close()
    assert writer.closed
    assert backlog.dropped == 2
    assert "2 records could not be written" in caplog.messages[-1]


def test_a_writer_that_cannot_be_closed_is_reported(caplog):
    class Stuck(MemoryWriter):
        def close(self):
            raise RuntimeError("stuck")

    assert not Backlog(Stuck()).close()
    assert "closing the writer failed" in caplog.text


def test_closing_with_nothing_left_succeeds_silently(caplog):
    writer = MemoryWriter()
    assert Backlog(writer).close()
    assert writer.closed
    assert not caplog.records
