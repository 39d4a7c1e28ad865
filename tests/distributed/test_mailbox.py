"""How bytes travel over the ranks' store: whole, in order, and without harm when the store fails."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from tests.distributed.post import FragileStore
from torchprobe.distributed import mailbox
from torchprobe.distributed.mailbox import Inbox, Mailbox, Outbox


def test_frames_of_several_chunks_arrive_whole_and_in_order_and_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(mailbox, "_CHUNK", 5)
    store = dist.HashStore()
    sent = [b"", b"a", b"0123456789" * 3]
    outbox, inbox = Outbox(Mailbox(store, 7), 2), Inbox(Mailbox(store, 7), 2)
    for frame in sent:
        outbox.send(frame)
    assert inbox.receive() == sent
    assert inbox.receive() == []
    assert store.num_keys() == 0


def test_half_a_frame_is_kept_until_the_rest_is_there(monkeypatch):
    monkeypatch.setattr(mailbox, "_CHUNK", 10)
    box = Mailbox(dist.HashStore(), 1)
    inbox, data = Inbox(box, 1), (12).to_bytes(8, "little") + b"twelve bytes"
    box.put("1/0", data[:10])
    assert inbox.receive() == []
    box.put("1/1", data[10:])
    assert inbox.receive() == [b"twelve bytes"]


def test_sessions_and_ranks_do_not_read_each_others_frames():
    store = dist.HashStore()
    Outbox(Mailbox(store, 1), 1).send(b"mine")
    assert Inbox(Mailbox(store, 2), 1).receive() == []
    assert Inbox(Mailbox(store, 1), 2).receive() == []
    assert Inbox(Mailbox(store, 1), 1).receive() == [b"mine"]


def test_an_outbox_is_full_until_it_is_fetched_from(monkeypatch):
    monkeypatch.setattr(mailbox, "_UNREAD", 3)
    box = Mailbox(dist.HashStore(), 1)
    outbox = Outbox(box, 1)
    for _ in range(3):
        assert not outbox.is_full
        outbox.send(b"x")
    assert outbox.is_full
    assert len(Inbox(box, 1).receive()) == 3
    assert not outbox.is_full


def test_a_store_that_fails_is_given_up_with_one_line(caplog):
    store = FragileStore(dist.HashStore())
    box = Mailbox(store, 1)
    outbox, inbox = Outbox(box, 1), Inbox(box, 1)
    outbox.send(b"x")
    store.broken = True
    assert inbox.receive() == []
    asked = store.asked
    outbox.send(b"y")
    box.put("what", b"z")
    assert box.fetch("what") is None
    assert not outbox.is_full
    assert store.asked == asked
    assert [r.getMessage() for r in caplog.records] == [
        "the store of torch.distributed is gone (Connection reset by peer): ranks are no longer combined"
    ]


def test_a_store_without_clone_is_used_itself():
    store = FragileStore(dist.HashStore())
    Mailbox(store, 1).put("parameters", b"[]")
    assert Mailbox(store, 1).fetch("parameters") == b"[]"


def test_the_users_own_timeout_stays(tmp_path):
    for store in (dist.HashStore(), dist.PrefixStore("p", dist.HashStore()), dist.FileStore(str(tmp_path / "f"), 1)):
        store.set_timeout(timedelta(seconds=77))
        Mailbox(store, 1)
        assert store.timeout == timedelta(seconds=77)
