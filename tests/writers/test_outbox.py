"""Whole files that wait while their place is out of reach."""

from __future__ import annotations

import threading

import pytest

from torchprobe.writers import files
from torchprobe.writers.files import MAX_WAITING, LocalPlace, Outbox


class Place:
    """Takes files while it is `up`; `hang` holds them up."""

    def __init__(self):
        self.files = {}
        self.up = True
        self.attempts = 0
        self.hang: threading.Event | None = None

    def put(self, name, data):
        self.attempts += 1
        if self.hang is not None:
            self.hang.wait()
        if not self.up:
            raise OSError("the network is down")
        self.files[name] = data


@pytest.fixture
def place():
    return Place()


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is set."""
    clock = [100.0]
    monkeypatch.setattr(files, "monotonic", lambda: clock[0])
    return clock


def test_a_file_is_there_at_once_and_replaces_an_older_one(place):
    box = Outbox(place, "file")
    box.put("a", b"1")
    box.put("a", b"2")
    assert place.files == {"a": b"2"}


def test_what_was_not_taken_is_tried_again_with_growing_pauses_and_said_once(place, now, caplog):
    box = Outbox(place, "file")
    place.up = False
    box.put("a", b"1")
    tries = []
    for _ in range(8):
        now[0] += 1
        box.retry()
        tries.append(place.attempts)
    assert tries == [2, 2, 3, 3, 3, 3, 4, 4]
    place.up = True
    now[0] += 100
    box.put("b", b"2")
    assert place.files == {"a": b"1", "b": b"2"}
    assert len(caplog.records) == 1


def test_the_first_files_are_kept_and_the_number_is_bounded(place, caplog):
    box = Outbox(place, "file")
    place.up = False
    for i in range(MAX_WAITING + 3):
        box.put(str(i), b"")
    assert box.dropped == 3
    place.up = True
    box.close(5)
    assert sorted(place.files) == [str(i) for i in range(MAX_WAITING)]
    assert "3 of the run's files could not be written" in caplog.text


def test_a_place_that_hangs_does_not_hold_up_the_end(place, caplog):
    box = Outbox(place, "file")
    place.up = False
    box.put("a", b"1")
    place.hang = threading.Event()
    box.close(0.1)
    assert "1 of the run's files could not be written" in caplog.text
    place.hang.set()
    for thread in threading.enumerate():
        if thread.name == "torchprobe-outbox":
            thread.join(10)


def test_a_local_file_is_never_half_there(tmp_path, full_disk):
    place = LocalPlace(tmp_path / "flight")
    assert place.put("1.json", b"old") == str(tmp_path / "flight" / "1.json")
    with full_disk(4), pytest.raises(OSError, match="log_dir="):
        place.put("1.json", b"new and long")
    assert (tmp_path / "flight" / "1.json").read_bytes() == b"old"
