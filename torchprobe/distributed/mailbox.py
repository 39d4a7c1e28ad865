"""How bytes travel from each rank to rank 0: through the key-value store that the ranks have in common anyway.

A collective waits for every rank, cannot be given up, and would need a process group of its own, which all ranks must
make together. The store needs none of that: a rank leaves its bytes under a key, and rank 0 looks whether they are
there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

_T = TypeVar("_T")
_log = logging.getLogger("torchprobe")

_CHUNK = 2**20  # bytes under one key; the store takes 8 MiB
_UNREAD = 64  # chunks of a rank that may wait there
_STORE_SECONDS = 5.0


class Mailbox:
    """What the ranks of one session leave for one another, under names.

    A store that fails (its process has ended) is given up, with one line in the log: nothing arrives from then on.
    """

    def __init__(self, store: Any, session: int) -> None:
        self._keep = store  # a clone does not keep the server alive
        self._store = _connection(store)
        self._session = session
        self.failed = False

    def put(self, what: str, data: bytes) -> None:
        """Leave bytes under a name."""
        self._ask(lambda: self._store.set(self._key(what), data), None)

    def holds(self, what: str) -> bool:
        """Whether there are bytes under a name."""
        return self._ask(lambda: self._store.check([self._key(what)]), False)

    def fetch(self, what: str) -> bytes | None:
        """The bytes under a name, when they are there. Never waits."""
        return self._ask(lambda: self._store.get(self._key(what)) if self.holds(what) else None, None)

    def remove(self, what: str) -> None:
        """Make room."""
        self._ask(lambda: self._store.delete_key(self._key(what)), False)

    def _key(self, what: str) -> str:
        return f"torchprobe/{self._session}/{what}"

    def _ask(self, question: Callable[[], _T], otherwise: _T) -> _T:
        if self.failed:
            return otherwise
        try:
            return question()
        except Exception as error:
            self.failed = True
            _log.warning(
                "the store of torch.distributed is gone (%s): ranks are no longer combined", _first_line(error)
            )
            return otherwise


class Outbox:
    """Sends the frames of one rank, cut into chunks that are numbered."""

    def __init__(self, mailbox: Mailbox, rank: int) -> None:
        self._mailbox = mailbox
        self._rank = rank
        self._number = 0

    @property
    def is_full(self) -> bool:
        """Whether rank 0 has not fetched for long."""
        oldest = self._number - _UNREAD
        return oldest >= 0 and self._mailbox.holds(f"{self._rank}/{oldest}")

    def send(self, frame: bytes) -> None:
        """Leave a frame for rank 0."""
        data = len(frame).to_bytes(8, "little") + frame
        for start in range(0, len(data), _CHUNK):
            self._mailbox.put(f"{self._rank}/{self._number}", data[start : start + _CHUNK])
            self._number += 1


class Inbox:
    """Receives the frames of one rank."""

    def __init__(self, mailbox: Mailbox, rank: int) -> None:
        self._mailbox = mailbox
        self._rank = rank
        self._number = 0
        self._data = bytearray()

    def receive(self) -> list[bytes]:
        """The frames that have arrived since; never waits."""
        while (chunk := self._mailbox.fetch(key := f"{self._rank}/{self._number}")) is not None:
            self._data += chunk
            self._number += 1
            self._mailbox.remove(key)
        frames = []
        while len(self._data) >= 8 and len(self._data) >= (end := 8 + int.from_bytes(self._data[:8], "little")):
            frames.append(bytes(self._data[8:end]))
            del self._data[:end]
        return frames


def open_mailbox(rank: int) -> Mailbox:
    """The mailbox of a session: the n-th of each rank belong together. Raises what the store raises."""
    from torch.distributed.distributed_c10d import _get_default_store  # not in every build of torch

    store: Any = _get_default_store()
    return Mailbox(store, store.add(f"torchprobe/sessions/{rank}", 1))


def _connection(store: Any) -> Any:
    """A connection of our own: in the store's own one another thread may be waiting.

    Older versions of torch, and some stores, have no `clone`; then it is the store itself, with the timeout that the
    user gave it, and the background thread may have to wait for the user's.
    """
    try:
        own = store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):
        return store
    usual = store.timeout
    own.set_timeout(timedelta(seconds=_STORE_SECONDS))
    if store.timeout != usual:  # one that lives in this process gives itself for its clone
        store.set_timeout(usual)
    return own


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
