"""One fault ends itself alone and is said; flush and close answer False when anything was lost."""

from __future__ import annotations

import pytest

from tests.buffer.draining import PATIENCE, put_all
from torchprobe.buffer import drain as drain_module
from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import STOPPED_TAG, Drain
from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import StepBuffer, StepInFlight, TransferBuffers
from torchprobe.records import Record, Text
from torchprobe.writers.protocol import MemoryWriter

ANY_KIND = [ValueError("odd"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()]


def names(error):
    return type(error).__name__


class Raising:
    """Raises once, when it is asked for the second time."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self):
        self.calls += 1
        if self.calls == 2:
            raise self.error


class Stage:
    """Marks each record that it sees."""

    def __init__(self, fail=lambda: None):
        self.fail = fail

    def __call__(self, record):
        self.fail()
        return Record(record.step, record.wall_time, {**record.values, "seen": 1.0})

    def at_rest(self):
        return None

    def close(self):
        self.fail()


class Exchange:
    """Other ranks, of which nothing is heard."""

    patience = None
    dropped = 0

    def __init__(self, fail):
        self.fail = fail

    def summary(self):
        return ""

    def pause(self):
        self.fail()

    def release(self, urgent):
        self.fail()
        return ()

    def close(self):
        self.fail()


@pytest.fixture
def closing():
    """Closes drains after the test."""
    drains = []
    yield lambda drain: drains.append(drain) or drain
    for drain in drains:
        drain.close(PATIENCE)


# ---- a fault stays where it is


@pytest.mark.parametrize("error", ANY_KIND, ids=names)
def test_a_writer_that_raises_once_gets_that_record_and_later_ones(open_drain, step, steps_in, caplog, error):
    fail = Raising(error)

    class Once(MemoryWriter):
        def write(self, records):
            fail()
            super().write(records)

    writer = Once()
    drain = open_drain(writer)
    for n in range(1, 5):
        put_all(drain, [step(n)])
        assert drain.flush(PATIENCE)
    assert steps_in(writer) == [1, 2, 3, 4]
    (logged,) = caplog.messages
    assert names(error) in logged
    assert names(error) in drain.faults[0]


@pytest.mark.parametrize("error", ANY_KIND, ids=names)
def test_a_writer_that_refuses_all_keeps_the_drain_alive_and_is_said_once(
    open_drain, step, steps_in, failing_writer, caplog, error
):
    writer = failing_writer(error)
    drain = open_drain(writer)
    for n in range(1, 5):
        put_all(drain, [step(n)])
        assert not drain.flush(PATIENCE)
    writer.error = None
    put_all(drain, [step(5)])
    assert drain.flush(PATIENCE)
    assert steps_in(writer) == [5]
    (logged,) = caplog.messages
    assert names(error) in logged
    assert drain.faults == [f"records that the writer refused: 4 ({names(error)})"]


@pytest.mark.parametrize("error", ANY_KIND, ids=names)
def test_a_step_that_cannot_be_read_costs_itself_alone(open_drain, step, to_record, steps_in, caplog, error):
    def decode(sent):
        if sent.step == 2:
            raise error
        return to_record(sent)

    writer = MemoryWriter()
    drain = open_drain(writer, decode)
    put_all(drain, map(step, range(1, 5)))
    assert not drain.flush(PATIENCE)
    assert steps_in(writer) == [1, 3, 4]
    (logged,) = caplog.messages
    assert names(error) in logged


@pytest.mark.parametrize("error", ANY_KIND, ids=names)
def test_alerts_that_raise_are_switched_off_and_every_record_is_written(closing, step, to_record, caplog, error):
    writer, stage = MemoryWriter(), Stage(Raising(error))
    drain = closing(Drain(writer, to_record, 3600.0, stage))
    put_all(drain, map(step, range(1, 5)))
    assert drain.flush(PATIENCE)
    assert [(r.step, "seen" in r.values) for r in writer.records] == [(1, True), (2, False), (3, False), (4, False)]
    (logged,) = caplog.messages
    assert names(error) in logged
    assert drain.faults == [f"alerts are switched off: 1 ({names(error)})"]


@pytest.mark.parametrize("error", ANY_KIND, ids=names)
def test_other_ranks_that_raise_at_every_call_take_no_record_along(closing, step, to_record, steps_in, caplog, error):
    def fail():
        raise error

    writer = MemoryWriter()
    drain = closing(Drain(writer, to_record, 3600.0, exchange=Exchange(fail)))
    for n in range(1, 4):
        put_all(drain, [step(n)])
        drain.flush(PATIENCE)
    assert steps_in(writer) == [1, 2, 3]
    assert not drain.close(PATIENCE)
    assert writer.closed
    assert all(names(error) in line for line in caplog.messages)
    assert len(caplog.messages) == 3  # asking, combining, taking leave: each once


@pytest.mark.parametrize("error", ANY_KIND, ids=names)
def test_a_writer_that_cannot_be_closed_is_said_and_close_is_false(open_drain, caplog, error):
    class Stuck(MemoryWriter):
        def close(self):
            raise error

    assert not open_drain(Stuck()).close(PATIENCE)
    assert names(error) in caplog.text


# ---- honest answers


def test_losses_are_told_until_new_steps_are_written_and_by_close_in_any_case(open_drain, step, failing_writer):
    writer = failing_writer(ValueError("no"))
    drain = open_drain(writer)
    put_all(drain, [step(1)])
    assert [drain.flush(PATIENCE) for _ in range(3)] == [False] * 3  # nothing has changed since
    writer.error = None
    put_all(drain, [step(2)])
    assert [drain.flush(PATIENCE) for _ in range(2)] == [True] * 2
    assert drain.close(PATIENCE) is False


def test_a_queue_that_overflows_is_said_once_with_what_to_do_and_in_total_at_the_end(
    open_drain, step, slow_writer, monkeypatch, caplog
):
    monkeypatch.setattr(drain_module, "MAX_WAITING", 5)
    drain = open_drain(slow_writer)
    put_all(drain, [step(0)])
    drain.wake()
    assert slow_writer.entered.wait(PATIENCE)
    for n in range(1, 40):
        if drain.admit():
            drain.put(step(n))
    (logged,) = caplog.messages
    assert "dropped" in logged
    assert "every=" in logged
    slow_writer.release.set()
    assert drain.flush(PATIENCE) is False
    assert drain.faults == ["steps dropped, the queue was full: 34"]
    assert drain.close(PATIENCE) is False
    assert "34 steps were dropped" in caplog.messages[-1]
    assert len(caplog.messages) == 2


def test_losses_of_an_earlier_process_are_counted_and_not_told_again(open_drain, step):
    drain = open_drain(MemoryWriter())
    drain.count_dropped(7)
    put_all(drain, [step(1)])
    assert drain.flush(PATIENCE)
    assert drain.dropped == 7
    assert drain.close(PATIENCE)


def test_a_run_that_stopped_recording_says_so_in_the_run_and_in_every_answer(closing):
    writer, decoder = MemoryWriter(), Decoder({})
    outlet = Outlet(TransferBuffers(100), closing(Drain(writer, decoder, 3600.0)), decoder, 100)
    outlet.hand_over(6, StepBuffer(values={"loss": 0.5}))
    assert outlet.drain.flush(PATIENCE)
    outlet.drain.stopped("ZeroDivisionError: division by zero")
    outlet.drain.stopped("and again")
    assert [outlet.drain.flush(PATIENCE) for _ in range(2)] == [False] * 2
    assert outlet.drain.close(PATIENCE) is False
    assert [record.step for record in writer.records] == [6, 6]
    text = writer.value(STOPPED_TAG, 6)
    assert isinstance(text, Text)
    assert "ZeroDivisionError: division by zero" in text.markdown
    assert outlet.faults == ["recording stopped: ZeroDivisionError: division by zero"]


# ---- no tag twice for one step


def of(number, **values):
    return StepInFlight(number, float(number), values)


def test_a_step_that_comes_in_two_parts_has_each_tag_once(open_drain):
    writer = MemoryWriter()
    drain = open_drain(writer)
    for part in (of(1, a=1.0), of(2, a=2.0, b=2.0), of(2, a=9.0, c=2.0), of(2, a=9.0), of(3, a=3.0), of(3, b=3.0)):
        put_all(drain, [part])
        assert drain.flush(PATIENCE)
    assert [(r.step, dict(r.values)) for r in writer.records] == [
        (1, {"a": 1.0}), (2, {"a": 2.0, "b": 2.0}), (2, {"c": 2.0}), (3, {"a": 3.0}), (3, {"b": 3.0})
    ]  # fmt: skip
    assert drain.dropped == 0


def test_a_late_value_of_the_step_before_is_kept_unless_its_tag_has_gone_on(open_drain):
    writer = MemoryWriter()
    drain = open_drain(writer)
    put_all(drain, [of(4, a=4.0), of(5, a=5.0, b=5.0), of(4, a=9.0, b=9.0, val=4.0), of(4, val=9.0), of(6, a=6.0)])
    assert drain.flush(PATIENCE)
    assert writer.scalars("a") == [(4, 4.0), (5, 5.0), (6, 6.0)]
    assert writer.scalars("b") == [(5, 5.0)]
    assert writer.scalars("val") == [(4, 4.0)]


def test_a_clock_that_is_set_back_loses_nothing(open_drain):
    writer = MemoryWriter()
    drain = open_drain(writer)
    put_all(drain, [of(n, a=float(n)) for n in (7, 8, 1, 2, 3)])
    assert drain.flush(PATIENCE)
    assert [step for step, _ in writer.scalars("a")] == [7, 8, 1, 2, 3]


def test_alerts_see_a_repeated_value_once(closing, to_record):
    seen = []

    class Seeing(Stage):
        def __call__(self, record):
            seen.append(dict(record.values))
            return super().__call__(record)

    writer = MemoryWriter()
    drain = closing(Drain(writer, to_record, 3600.0, Seeing()))
    put_all(drain, [of(1, a=1.0), of(1, a=1.0), of(1, b=1.0)])
    assert drain.flush(PATIENCE)
    assert seen == [{"a": 1.0}, {"b": 1.0}]
    assert writer.scalars("seen") == [(1, 1.0)]
