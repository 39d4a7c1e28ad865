"""The training thread never waits and never fails; deadlines hold; nothing is lost in silence."""

from __future__ import annotations

import math
import threading

import pytest

from tests.buffer.draining import PATIENCE, put_all
from torchprobe.writers.protocol import MemoryWriter

# ---- writing


def test_flush_writes_what_was_put_in_the_order_of_put(open_drain, step, steps_in):
    writer = MemoryWriter()
    drain = open_drain(writer)
    put_all(drain, map(step, range(500)))
    assert drain.flush(PATIENCE)
    assert steps_in(writer) == list(range(500))
    assert drain.dropped == 0


def test_order_holds_while_the_thread_is_at_work(open_drain, step, steps_in):
    writer = MemoryWriter()
    drain = open_drain(writer)
    for n in range(500):
        put_all(drain, [step(n)])
        if n % 7 == 0:
            drain.wake()
    assert drain.close(PATIENCE)
    assert steps_in(writer) == list(range(500))


def test_a_burst_of_wakes_is_served_by_a_few_writes(open_drain, step, slow_writer):
    drain = open_drain(slow_writer)
    put_all(drain, [step(1)])
    drain.wake()
    assert slow_writer.entered.wait(PATIENCE)
    cycles = []
    collect = drain._collect
    drain._collect = lambda: (cycles.append(1), collect())
    for n in range(2, 1000):
        put_all(drain, [step(n)])
        drain.wake()
    slow_writer.release.set()
    assert drain.flush(PATIENCE)
    assert len(cycles) <= 2
    assert len(slow_writer.records) == 999


def test_a_step_is_written_in_time_without_being_asked_for(open_drain, step):
    written = threading.Event()

    class Telling(MemoryWriter):
        def write(self, records):
            super().write(records)
            written.set()

    drain = open_drain(Telling(), flush_seconds=0.01)
    drain.put(step(1))
    assert written.wait(PATIENCE)


def test_steps_that_arrive_all_the_time_do_not_keep_others_from_being_written(open_drain, step, to_record):
    batches = []

    class Batches(MemoryWriter):
        def write(self, records):
            batches.append([record.step for record in records])

    def decode(sealed):
        if sealed.step < 50:
            drain.put(step(sealed.step + 1))  # training is as fast as reading
        return to_record(sealed)

    drain = open_drain(Batches(), decode)
    drain.put(step(0))
    assert drain.flush(PATIENCE)
    assert batches[0] == [0]


@pytest.mark.parametrize("flush_seconds", [math.inf, 1e12])
def test_an_endless_time_between_flushes_is_fine(open_drain, step, steps_in, flush_seconds):
    writer = MemoryWriter()
    drain = open_drain(writer, flush_seconds=flush_seconds)
    drain.put(step(1))
    assert drain.flush(math.inf)
    assert steps_in(writer) == [1]
    assert drain.close(math.inf)


def test_flushes_of_several_threads_are_all_served(open_drain, step, steps_in):
    writer = MemoryWriter()
    drain = open_drain(writer)
    results = []

    def put_and_flush(n):
        drain.put(step(n))
        written = drain.flush(PATIENCE)
        results.append(written and n in steps_in(writer))

    threads = [threading.Thread(target=put_and_flush, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == [True] * 12
    assert sorted(steps_in(writer)) == list(range(12))


# ---- the end


def test_closing_writes_what_is_left_and_ends_the_thread(open_drain, step, steps_in):
    writer = MemoryWriter()
    drain = open_drain(writer)
    put_all(drain, map(step, range(3)))
    assert drain.close(PATIENCE)
    assert steps_in(writer) == [0, 1, 2]
    assert writer.closed
    assert not drain._thread.is_alive()


def test_closing_writes_what_was_put_while_the_thread_was_at_work(open_drain, step, slow_writer):
    drain = open_drain(slow_writer)
    put_all(drain, [step(0)])
    drain.wake()
    assert slow_writer.entered.wait(PATIENCE)
    put_all(drain, [step(1)])
    assert not drain.close(0)
    slow_writer.release.set()
    assert drain.close(PATIENCE)
    assert [r.step for r in slow_writer.records] == [0, 1]


def test_closing_twice_says_the_same_twice(open_drain, step, failing_writer):
    good, bad = open_drain(MemoryWriter()), open_drain(failing_writer(OSError("disk full")))
    put_all(good, [step(1)])
    put_all(bad, [step(1)])
    assert [good.close(PATIENCE), good.close(0)] == [True, True]
    assert [bad.close(PATIENCE), bad.close(0)] == [False, False]


def test_after_closing_a_flush_is_false_at_once_and_steps_are_turned_away(open_drain, step, in_thread):
    writer = MemoryWriter()
    drain = open_drain(writer)
    assert drain.close(PATIENCE)
    assert in_thread(drain.flush) is False
    assert not drain.admit()
    assert drain.dropped == 1
    assert writer.records == []


@pytest.mark.parametrize("call", ["flush", "close"])
def test_the_thread_itself_may_ask_as_a_finalizer_that_it_runs_does(open_drain, step, in_thread, call):
    answers = []

    def decode(sealed):
        answers.append(getattr(drain, call)())

    drain = open_drain(MemoryWriter(), decode)
    drain.put(step(1))
    in_thread(drain.flush)
    assert answers == [False]
    assert drain.close(PATIENCE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting_and_steps_are_counted(open_drain, step, in_thread, monkeypatch):
    drain = open_drain(MemoryWriter())
    monkeypatch.setattr(drain, "_collect", lambda: 1 / 0)  # a fault of ours: no writer, probe or rule can do that
    put_all(drain, [step(1)])
    assert in_thread(drain.flush) is False
    assert not drain.admit()
    assert drain.dropped == 2
    assert in_thread(drain.close) is False
