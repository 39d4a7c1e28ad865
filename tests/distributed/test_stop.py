"""`stop_on=` on several ranks: all of them raise, at the same step, whoever saw the illness."""

from __future__ import annotations

import threading
from time import monotonic

import pytest

from tests.distributed.launch import launch
from torchprobe.distributed import world
from torchprobe.distributed.world import Stopping, World
from torchprobe.rules.alert import Alert

ALERT = Alert("non_finite", 3, None, float("nan"), None, "NaN")


def test_all_ranks_raise_at_the_same_step(tmp_path):
    found = launch("tests.distributed.stop_scenario", 2, tmp_path, timeout=90)
    assert found[0] == found[1]
    assert (found[0]["rule"], found[0]["at"]) == ("non_finite", 20)
    assert found[0]["step"] >= 20


class Store:
    """A mailbox that all ranks of a test share."""

    def __init__(self):
        self.left = {}

    def put(self, what, data):
        self.left[what] = data

    def fetch(self, what):
        return self.left.get(what)


def ranks(completed):
    """One `Stopping` a rank, and what each was held with."""
    held = []

    def holds(steps):
        def hold(alert):
            held.append(alert)
            return steps

        return hold

    all_of_them = [Stopping(World(rank, len(completed))) for rank in range(len(completed))]
    for one, steps in zip(all_of_them, completed, strict=True):
        one.hold = holds(steps)
    return all_of_them, held


@pytest.mark.parametrize("completed", [(7, 7), (7, 8), (8, 7, 6)])
def test_the_boundary_is_one_that_no_rank_has_passed(completed):
    (first, *others), held = ranks(completed)
    store = Store()
    first.propose(ALERT, completed[0])
    for _ in range(3):
        for one in (first, *others):
            one.poll(store)
    at = max(completed) + 1
    for one in (first, *others):
        assert not one.reached(at - 1)
        assert one.reached(at)
        assert one.pause() is None
    assert [str(alert) for alert in held] == [str(ALERT)] * len(others)


def test_a_rank_waits_at_its_boundary_until_the_others_have_answered():
    (first, second), _ = ranks((5, 5))
    store = Store()
    first.propose(ALERT, 5)
    first.poll(store)
    later = threading.Timer(0.2, lambda: (second.poll(store), first.poll(store)))
    later.start()
    assert first.reached(6)
    later.join()


def test_a_rank_that_never_answers_costs_a_wait_with_an_end(monkeypatch, caplog):
    monkeypatch.setattr(world, "PATIENCE", 0.2)
    (first, _), _ = ranks((5, 5))
    first.propose(ALERT, 5)
    first.poll(Store())
    start = monotonic()
    assert first.reached(6)
    assert monotonic() - start >= 0.2
    assert "stops by itself" in caplog.text


def test_nothing_is_asked_of_the_store_where_no_rule_may_end_the_run():
    one = Stopping(World(1, 2))
    one.poll(None)
    one.poll(object())  # type: ignore[arg-type]
    assert one.pause() is None
