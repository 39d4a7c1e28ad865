"""Ranges never overlap, come back in order, and use all the room there is."""

from __future__ import annotations

import threading

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from torchprobe.buffer.transfer import Ring


class RingMachine(RuleBasedStateMachine):
    """Any order of calls, beside a naive list of the ranges that are out."""

    @initialize(capacity=st.integers(1, 40))
    def start(self, capacity):
        self.ring = Ring(capacity)
        self.out = []

    @rule(size=st.integers(0, 45))
    def reserve(self, size):
        room = self.room()
        start = self.ring.reserve(size)
        assert (start is not None) == (size <= room)
        if start is not None:
            assert 0 <= start <= start + size <= self.ring.capacity
            assert not any(max(start, a) < min(start + size, b) for a, b in self.out)
            self.out.append((start, start + size))

    @rule(size=st.integers(0, 45))
    def reserve_and_cancel(self, size):
        if self.ring.reserve(size) is not None:
            self.ring.cancel()

    @precondition(lambda self: self.out)
    @rule()
    def release(self):
        self.ring.release()
        self.out.pop(0)

    @invariant()
    def nothing_out_is_all_free(self):
        if not getattr(self, "out", True):
            assert not self.ring.crowded
            assert self.room() == self.ring.capacity

    def room(self):
        """The longest free run after the newest range, without what lies between ranges."""
        if not self.out:
            return self.ring.capacity
        oldest, newest = self.out[0][0], self.out[-1][1]
        if newest > oldest or not any(b > a for a, b in self.out):
            return max(self.ring.capacity - newest, oldest)
        return oldest - newest


RingMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestRing = RingMachine.TestCase


def test_ranges_come_one_after_the_other_and_wrap_around():
    ring = Ring(10)
    assert [ring.reserve(4), ring.reserve(4), ring.reserve(4)] == [0, 4, None]
    ring.release()
    assert ring.reserve(4) == 0


def test_a_range_of_the_whole_buffer_fits_whenever_it_is_empty():
    ring = Ring(10)
    for _ in range(3):
        assert ring.reserve(3) == 0
        ring.release()
        assert ring.reserve(10) == 0
        ring.release()
    assert ring.reserve(11) is None


def test_what_is_skipped_at_the_end_is_free_again_with_the_range_before_it():
    ring = Ring(10)
    ring.reserve(5), ring.reserve(3)
    ring.release()
    assert ring.reserve(4) == 0  # 2 elements at the end are skipped
    ring.release()
    assert ring.reserve(6) == 4


def test_ranges_without_elements_take_no_room():
    ring = Ring(10)
    assert ring.reserve(0) == 0
    assert ring.reserve(10) == 0
    ring.release(), ring.release()
    assert ring.reserve(10) == 0


def test_more_than_half_taken_is_crowded():
    ring = Ring(10)
    ring.reserve(5)
    assert not ring.crowded
    ring.reserve(1)
    assert ring.crowded
    ring.release()
    assert not ring.crowded


def test_one_thread_reserves_and_another_releases():
    ring, out, clashes = Ring(97), [], []
    handed, freed = threading.Semaphore(0), threading.Semaphore(0)

    def consume():
        for _ in range(2000):
            handed.acquire()
            out.pop(0)  # no longer in use, and only then given back
            ring.release()
            freed.release()

    consumer = threading.Thread(target=consume)
    consumer.start()
    for i in range(2000):
        size = 1 + i % 23
        while (start := ring.reserve(size)) is None:
            freed.acquire()
        clashes += [r for r in list(out) if max(start, r[0]) < min(start + size, r[1])]
        out.append((start, start + size))
        handed.release()
    consumer.join()
    assert not clashes
