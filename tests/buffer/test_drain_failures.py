"""A disk that is slow or fails, and steps that cannot be read."""

from __future__ import annotations

import logging
import subprocess
import textwrap
import threading

import pytest

from tests import warm
from tests.buffer.draining import PATIENCE, put_all
from torchprobe.buffer import backlog as backlog_module
from torchprobe.buffer import drain as drain_module
from torchprobe.writers.protocol import MemoryWriter

# ---- a slow disk


def test_the_training_thread_passes_while_the_writer_hangs(open_drain, step, slow_writer, in_thread):
    drain = open_drain(slow_writer)
    drain.put(step(0))
    drain.wake()
    assert slow_writer.entered.wait(PATIENCE)

    def train():
        for n in range(1, 200):
            assert drain.admit()
            drain.put(step(n))
            drain.wake()
        return drain.dropped

    assert in_thread(train) == 0
    assert slow_writer.records == []  # it hung all the time
    slow_writer.release.set()
    assert drain.flush(PATIENCE)
    assert len(slow_writer.records) == 200


def test_the_training_thread_passes_while_a_step_is_read(open_drain, step, in_thread):
    reading, go_on = threading.Event(), threading.Event()

    def slow_decode(sealed):
        reading.set()
        assert go_on.wait(PATIENCE)

    drain = open_drain(MemoryWriter(), slow_decode)
    drain.put(step(0))
    drain.wake()
    assert reading.wait(PATIENCE)
    assert in_thread(lambda: (drain.admit(), drain.put(step(1)), drain.wake(), drain.flush(0.01)))[3] is False
    go_on.set()
    assert drain.flush(PATIENCE)


@pytest.mark.parametrize("timeout", [0.05, 0, -1])
def test_a_flush_keeps_its_deadline_while_the_writer_hangs(open_drain, step, slow_writer, in_thread, timeout):
    drain = open_drain(slow_writer)
    drain.put(step(1))
    drain.wake()
    assert slow_writer.entered.wait(PATIENCE)
    assert in_thread(drain.flush, timeout) is False
    slow_writer.release.set()
    assert drain.flush(PATIENCE)


def test_closing_keeps_one_deadline_while_the_writer_hangs(open_drain, step, slow_writer, in_thread, monkeypatch):
    drain = open_drain(slow_writer)
    drain.put(step(1))
    waits = []
    join, wait_for = drain._thread.join, drain._wake.wait_for
    monkeypatch.setattr(drain._thread, "join", lambda timeout: (waits.append(timeout), join(timeout)))

    def waiting(predicate, timeout):
        if threading.current_thread() is not drain._thread:
            waits.append(timeout)
        return wait_for(predicate, timeout)

    monkeypatch.setattr(drain._wake, "wait_for", waiting)
    assert in_thread(drain.close, 0.2) is False
    assert sum(waits) <= 0.2
    assert drain._thread.is_alive()
    assert drain._thread.daemon
    slow_writer.release.set()
    assert drain.close(PATIENCE)  # the thread went on by itself
    assert [r.step for r in slow_writer.records] == [1]
    assert slow_writer.closed


def test_a_thread_that_hangs_does_not_keep_the_interpreter():
    script = """
        import threading
        from torchprobe.buffer.drain import Drain
        from torchprobe.buffer.step import StepInFlight
        from torchprobe.records import Record

        class Hanging:
            def write(self, records):
                threading.Event().wait()
            def close(self):
                pass

        drain = Drain(Hanging(), lambda sealed: Record(1, 0.0, {"a": 1.0}), 30.0)
        drain.put(StepInFlight(1, 0.0, {}))
        print(drain.close(0.2))
    """
    result = subprocess.run(
        [*warm.python(), "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout == "False\n"


def test_steps_beyond_the_bound_are_turned_away_and_counted(open_drain, step, slow_writer, monkeypatch):
    monkeypatch.setattr(drain_module, "MAX_WAITING", 5)
    drain = open_drain(slow_writer)
    put_all(drain, [step(0)])
    drain.wake()
    assert slow_writer.entered.wait(PATIENCE)
    admitted = [drain.admit() and not drain.put(step(n)) for n in range(1, 9)]
    assert admitted == [True] * 5 + [False] * 3
    assert drain.dropped == 3
    slow_writer.release.set()
    assert not drain.flush(PATIENCE)  # three are lost
    assert [r.step for r in slow_writer.records] == list(range(6))
    assert drain.admit()


# ---- a disk that fails


def test_a_writer_that_heals_has_every_step_once_and_in_order(open_drain, step, steps_in, failing_writer, caplog):
    writer = failing_writer(OSError("disk full"))
    drain = open_drain(writer)
    for n in range(4):
        put_all(drain, [step(n)])
        assert not drain.flush(PATIENCE)
    writer.error = None
    put_all(drain, [step(4)])
    assert drain.flush(PATIENCE)
    assert steps_in(writer) == [0, 1, 2, 3, 4]
    assert drain.dropped == 0
    assert [entry.levelname for entry in caplog.records] == ["ERROR", "WARNING"]  # that it failed, that it works again


def test_a_failed_write_is_tried_again_without_being_asked_for(open_drain, step, failing_writer, monkeypatch):
    monkeypatch.setattr(backlog_module, "_FIRST_RETRY", 0.01)
    monkeypatch.setattr(backlog_module, "_LAST_RETRY", 0.01)
    healed = threading.Event()

    class Healing(failing_writer):
        def write(self, records):
            if self.attempts == 3:
                self.error = None
            super().write(records)
            healed.set()

    drain = open_drain(Healing(OSError("disk full")))
    drain.put(step(1))
    drain.wake()
    assert healed.wait(PATIENCE)


def test_a_writer_that_always_fails_costs_the_oldest_steps_and_bounded_memory(
    open_drain, step, failing_writer, monkeypatch
):
    monkeypatch.setattr(backlog_module, "MAX_RECORDS", 10)
    writer = failing_writer(OSError("disk full"))
    drain = open_drain(writer)
    for n in range(100):
        put_all(drain, [step(n)])
        if n % 10 == 9:
            assert not drain.flush(PATIENCE)
    assert drain.dropped == 90
    assert not drain.close(PATIENCE)
    assert drain.dropped == 100


def test_a_record_that_the_writer_cannot_take_is_dropped_alone(open_drain, step, steps_in, caplog):
    class Picky(MemoryWriter):
        def write(self, records):
            if any(record.step == 2 for record in records):
                raise TypeError("no such value")
            super().write(records)

    writer = Picky()
    drain = open_drain(writer)
    put_all(drain, map(step, range(5)))
    assert not drain.flush(PATIENCE)  # not everything is written
    assert steps_in(writer) == [0, 1, 3, 4]
    assert drain.dropped == 1
    put_all(drain, [step(5)])
    assert drain.flush(PATIENCE)
    assert not drain.close(PATIENCE)  # it answers for the whole run
    assert len(caplog.records) == 1


# ---- steps that cannot be read


def test_a_step_that_cannot_be_read_is_dropped_and_logged_once(open_drain, step, to_record, steps_in, caplog):
    def decode(sealed):
        if sealed.step in (1, 3):
            raise RuntimeError("device lost")
        return to_record(sealed) if sealed.step != 2 else None

    writer = MemoryWriter()
    drain = open_drain(writer, decode)
    put_all(drain, map(step, range(6)))
    assert not drain.flush(PATIENCE)
    assert steps_in(writer) == [0, 4, 5]
    assert drain.dropped == 2
    (logged,) = caplog.records
    assert logged.levelno == logging.ERROR
    assert logged.exc_info[0] is RuntimeError


def test_a_step_that_lost_its_device_values_is_counted(open_drain, step):
    writer = MemoryWriter()
    drain = open_drain(writer)
    part = step(1)
    part.lost = True
    put_all(drain, [part, step(2)])
    assert not drain.flush(PATIENCE)
    assert drain.dropped == 1
    assert len(writer.records) == 2
