"""What rank 0 and the others make of what arrives or does not: nothing raises, and what is lost is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from tests.distributed.post import FragileStore, Ranks
from torchprobe.buffer.step import Share
from torchprobe.distributed import gatherer, mailbox, sender
from torchprobe.distributed.gatherer import Peer
from torchprobe.distributed.mailbox import Frame, FrameEncoder, Key, Numbering, Part, Step


@pytest.fixture
def ranks(monkeypatch):
    return lambda size=3, **options: Ranks(monkeypatch, size, **options)


@pytest.fixture
def impatient(monkeypatch):
    """A step waits for nobody."""
    for name in ("PATIENCE", "URGENT_PATIENCE", "GRACE"):
        monkeypatch.setattr(gatherer, name, -1.0)


# ---- what rank 0 knows of another


class Letters:
    def __init__(self) -> None:
        self.waiting: list[bytes] = []

    def receive(self) -> list[bytes]:
        some, self.waiting = self.waiting, []
        return some


@pytest.fixture
def letters():
    return Letters()


def step(number: int) -> Step:
    return Step(Key(0, number, 0), [Part("0:P", "", ["x"], np.ones((1, 1)))])


def test_a_peer_owes_what_is_beyond_its_mark(letters):
    peer, encode = Peer(1, letters), FrameEncoder()
    assert not peer.owes(Key(0, 1, 0))  # nobody waits for a rank that never spoke
    letters.waiting = [encode(Frame())]
    peer.poll(Key(0, 0, 0))
    assert peer.owes(Key(0, 1, 0))
    letters.waiting = [encode(Frame(Key(0, 2, 0), [step(1)]))]
    peer.poll(Key(0, 0, 0))
    assert not peer.owes(Key(0, 2, 0))
    assert peer.owes(Key(0, 3, 0))
    assert [key for key, _ in peer.take_until(Key(0, 2, 0))] == [Key(0, 1, 0)]
    letters.waiting = [encode(Frame(bye=True))]
    peer.poll(Key(0, 2, 0))
    assert not peer.owes(Key(0, 3, 0))


def test_a_late_peer_is_back_when_it_speaks_and_what_came_too_late_is_counted(letters):
    peer, encode = Peer(1, letters), FrameEncoder()
    peer.heard = peer.late = True
    letters.waiting = [encode(Frame(Key(0, 5, 0), [step(1), step(2), step(5)]))]
    peer.poll(Key(0, 3, 0))
    assert not peer.late
    assert peer.too_late == 2
    assert [key.step for key, _ in peer.take_until(Key(0, 9, 0))] == [5]


def test_a_peer_that_says_what_cannot_be_read_is_left_out(letters, caplog):
    peer = Peer(1, letters)
    letters.waiting = [FrameEncoder()(Frame()), b"no frame"]
    peer.poll(Key(0, 0, 0))
    assert not peer.owes(Key(0, 1, 0))
    letters.waiting = [FrameEncoder()(Frame(Key(0, 1, 0), [step(1)]))]  # whose names would be others
    peer.poll(Key(0, 0, 0))
    assert list(peer.take_until(Key(0, 1, 0))) == []
    assert not peer.is_here
    assert caplog.text.count("what rank 1 sent cannot be read") == 1


def test_two_ranks_number_alike_when_steps_repeat_or_begin_anew():
    numbers = [1, 1, 2, 1, 1, 3]
    keys = [Numbering() for _ in range(2)]
    first, second = ([numbering.next(n) for n in numbers] for numbering in keys)
    assert first == second == sorted(set(first))


# ---- rank 0 and the others


def test_a_step_waits_for_every_rank_and_is_their_sum(ranks):
    world = ranks()
    for rank, value in enumerate((1.0, 10.0, 100.0)):
        world.see(rank, 1, value)
    assert world.totals() == {}
    world.send(1)
    assert world.totals() == {}
    world.send(2)
    (record,) = world.written()
    assert (record.step, record.values) == (1, {"mine": 0.0, "total/x": 111.0})
    assert world.first.summary() == "3"
    assert world.first.dropped == 0


def test_what_another_rank_alone_has_seen_is_in_a_record_of_its_step(ranks):
    world = ranks(2)
    world.see(1, 1, 5.0)
    world.see(1, 2, 6.0)
    world.send(1)
    world.see(0, 2, 1.0)
    assert world.totals() == {1: 5.0, 2: 7.0}


def test_a_rank_that_saw_nothing_says_so_and_is_not_waited_for(ranks):
    world = ranks(2)
    world.see(0, 1, 1.0)
    world.see(1, 1, None)
    world.send(1)
    assert world.totals() == {1: 1.0}


def test_a_late_rank_is_left_out_until_it_is_back(ranks, impatient, caplog):
    world = ranks(2)
    world.see(0, 1, 1.0)
    world.see(0, 2, 1.0)
    assert world.totals() == {1: 1.0, 2: 1.0}
    assert caplog.text.count("rank 1 is late with step 1") == 1
    assert world.first.summary() == "2; absent or late: 1; steps that lack a rank: 2"
    for number in (1, 2, 3):
        world.see(1, number, 10.0)
    world.send(1)
    world.see(0, 3, 1.0)
    assert world.totals() == {3: 11.0}
    assert world.first.dropped == 2
    assert world.first.absent == []


def test_a_flush_waits_for_a_dead_rank_once(ranks, impatient):
    world = ranks(3)
    for number in (1, 2):
        for rank in (0, 1):
            world.see(rank, number, 1.0)
    world.send(1)
    assert world.totals(urgent=True) == {1: 2.0, 2: 2.0}
    assert world.first.absent == [2]
    world.see(0, 3, 1.0)
    world.see(1, 3, 1.0)
    world.send(1)
    assert world.first.pause() is not None
    assert world.totals() == {3: 2.0}
    assert world.first.pause() is None


def test_a_rank_that_left_is_neither_waited_for_nor_absent(ranks):
    world = ranks(2)
    world.others[1].close()
    world.see(0, 1, 1.0)
    assert world.totals() == {1: 1.0}
    assert world.first.summary() == "2"


def test_ranks_that_never_called_instrument_are_waited_for_briefly(ranks, monkeypatch):
    world = ranks(2)
    world.first._peers[0]._inbox.receive()  # its word never came
    world.see(0, 1, 1.0)
    assert world.totals() == {}
    monkeypatch.setattr(gatherer, "GRACE", -1.0)
    assert world.totals() == {1: 1.0}
    assert world.first.absent == [1]


def test_rank_0_keeps_a_bounded_number_of_steps(ranks, monkeypatch):
    monkeypatch.setattr(gatherer, "MAX_WAITING", 3)
    world = ranks(2)
    for number in range(1, 6):
        world.see(0, number, 1.0)
    assert list(world.totals()) == [1, 2]


def test_a_shard_that_is_missing_leaves_the_parameter_out_and_counts_the_step(ranks, impatient):
    world = ranks(2)
    world.see(0, 1, 3.0, share=Share(10, 5, 0))
    assert world.totals() == {1: None}
    assert world.first.dropped == 1


def test_a_full_outbox_drops_steps_and_counts_them_and_goes_on_when_there_is_room(ranks, monkeypatch):
    monkeypatch.setattr(mailbox, "_UNREAD", 2)
    world = ranks(2)
    for number in range(1, 5):
        world.see(1, number, 10.0)
        world.send(1)
    assert world.others[1].dropped == 3
    assert "steps lost on the way: 3" in world.others[1].summary()
    for number in range(1, 6):
        world.see(0, number, 1.0)
    assert world.totals() == {1: 11.0, 2: 1.0, 3: 1.0, 4: 1.0}
    world.see(1, 5, 10.0)
    world.send(1)
    assert world.totals() == {5: 11.0}


def test_parameters_that_rank_0_sees_whole_are_not_sent(ranks):
    world, whole = ranks(2), Share(4, 4, 0)
    for rank in (1, 0):
        world.see(rank, 1, 2.0, share=whole)
    world.send(1)
    assert world.totals() == {1: 2.0}
    world.see(1, 2, 3.0, share=whole)
    world.send(1)
    world.first._poll()
    assert world.first._peers[0]._steps == {}
    world.see(0, 2, 3.0, share=whole)
    assert world.totals() == {2: 3.0}


def test_a_store_that_breaks_leaves_each_rank_alone(ranks, caplog):
    world = ranks(2, store=FragileStore(dist.HashStore()))
    world.see(0, 1, 1.0)
    world.see(1, 1, 10.0)
    world.send(1)
    assert world.totals() == {1: 11.0}
    world.store.broken = True
    for number in (2, 3):
        for rank in (0, 1):
            world.see(rank, number, 1.0)
        world.send(1)
        assert world.totals() == {number: 1.0}
    world.others[1].close()
    assert world.totals(urgent=True) == {}
    assert world.others[1].dropped == 2
    assert world.first.absent == [1]
    assert world.first.summary() == "2; absent or late: 1; steps that lack a rank: 2"
    assert caplog.text.count("is gone") == 2  # once a rank


def test_steps_before_the_store_is_there_are_kept_up_to_a_bound_and_counted_beyond(ranks, monkeypatch):
    monkeypatch.setattr(sender, "MAX_WAITING", 2)
    world = ranks(2, connected=False)
    for number in (1, 2, 3):
        world.see(1, number, 10.0)
        world.send(1)
    assert world.others[1].dropped == 1
    world.connected = True
    world.send(1)
    for number in (1, 2, 3):
        world.see(0, number, 1.0)
    assert world.totals() == {1: 11.0, 2: 11.0, 3: 1.0}


def test_without_a_store_rank_0_writes_at_once(ranks):
    world = ranks(2, connected=False)
    world.see(0, 1, 1.0)
    assert world.totals() == {1: 1.0}
    assert world.first.absent == [1]


@pytest.mark.parametrize("module", [gatherer, sender])
def test_a_store_that_cannot_be_opened_is_said_and_costs_the_other_ranks(ranks, monkeypatch, caplog, module):
    world = ranks(2, connected=False)

    def refuse(rank):
        raise RuntimeError("no store")

    monkeypatch.setattr(module, "open_mailbox", refuse)
    world.connected = True
    world.see(0, 1, 1.0)
    world.see(1, 1, 10.0)
    world.send(1)
    monkeypatch.setattr(gatherer, "GRACE", -1.0)
    assert world.totals() == {1: 1.0}
    assert "cannot reach the store of torch.distributed" in caplog.text
