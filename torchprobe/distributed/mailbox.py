"""What ranks send to rank 0: as bytes, and through the key-value store that they have in common anyway.

A frame is a JSON header with everything that is text, and the rows behind it. A name travels once; from then on its
number stands for it. Frames are compressed: rows of counts are mostly zeros.

A collective waits for every rank, cannot be given up, and would need a process group of its own, which all ranks must
make together. The store needs none of that: a rank leaves its bytes under a key, and rank 0 looks whether they are
there.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchprobe.buffer.step import WHOLE, Share
from torchprobe.messages import log as _log

_T = TypeVar("_T")

_CHUNK = 2**20  # bytes under one key; the store takes 8 MiB
_UNREAD = 64  # chunks of a rank that may wait there
_STORE_SECONDS = 5.0
_HEADER_BYTES = 4


class Key(NamedTuple):
    """A place in the order of what a rank hands over."""

    restart: int
    """How often step numbers began anew, as after forward passes that turned out to be no training."""
    step: int
    part: int
    """0 for a step's first record; more for what is logged to a step that was handed over already."""


class Numbering:
    """Gives each step that is handed over its key; two ranks that do the same get the same keys."""

    def __init__(self) -> None:
        self._last = Key(0, 0, 0)

    def next(self, step: int) -> Key:
        """The key of the step that is handed over now; keys increase."""
        restart, last, part = self._last
        if step > last:
            self._last = Key(restart, step, 0)
        else:
            self._last = Key(restart, step, part + 1) if step == last else Key(restart + 1, step, 0)
        return self._last


class Part(NamedTuple):
    """Rows of one probe from one rank: shape (len(names), fields)."""

    reporter: str
    prefix: str
    names: Sequence[str]
    rows: NDArray[np.float64]
    shards: Sequence[Share] | None = None


class Step(NamedTuple):
    """What a rank hands over at once."""

    key: Key
    parts: Sequence[Part]
    same_data: Sequence[int] = ()


@dataclass
class Frame:
    """A message: everything up to and including `mark` has been sent with it; `bye` says that nothing follows."""

    mark: Key | None = None
    steps: Sequence[Step] = field(default_factory=list)
    bye: bool = False


class FrameEncoder:
    """Makes bytes of frames, which one `FrameDecoder` must see in the same order."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, frame: Frame) -> bytes:
        """The bytes of a frame."""
        known = len(self._numbers)
        steps = [[step.key, list(map(self._described, step.parts)), list(step.same_data)] for step in frame.steps]
        header = {"mark": frame.mark, "bye": frame.bye, "steps": steps, "names": list(self._numbers)[known:]}
        text = json.dumps(header, separators=(",", ":")).encode()
        rows = [part.rows.astype("<f8", copy=False).tobytes() for step in frame.steps for part in step.parts]
        return zlib.compress(b"".join((len(text).to_bytes(_HEADER_BYTES, "little"), text, *rows)), 1)

    def _described(self, part: Part) -> list[Any]:
        names = [self._numbers.setdefault(name, len(self._numbers)) for name in part.names]
        plain = part.shards is not None and all(shard.is_whole for shard in part.shards)
        return [part.reporter, part.prefix, names, part.rows.shape[1], [] if plain else part.shards]


class FrameDecoder:
    """Reads frames in the order in which one `FrameEncoder` made them."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def __call__(self, data: bytes) -> Frame:
        """The frame of some bytes. Raises ValueError or a kin of it for others."""
        raw = memoryview(zlib.decompress(data))
        end = _HEADER_BYTES + int.from_bytes(raw[:_HEADER_BYTES], "little")
        header = json.loads(bytes(raw[_HEADER_BYTES:end]))
        self._names += header["names"]
        numbers = np.frombuffer(raw[end:], dtype="<f8")
        steps = []
        for key, described, same_data in header["steps"]:
            parts, numbers = self._parts(described, numbers)
            steps.append(Step(Key(*key), parts, tuple(same_data)))
        return Frame(None if header["mark"] is None else Key(*header["mark"]), steps, header["bye"])

    def _parts(self, described: Iterable[Any], numbers: NDArray[Any]) -> tuple[list[Part], NDArray[Any]]:
        parts = []
        for reporter, prefix, indices, width, shards in described:
            size = len(indices) * width
            rows, numbers = numbers[:size].reshape(len(indices), width), numbers[size:]
            names = [self._names[i] for i in indices]
            parts.append(Part(reporter, prefix, names, rows.astype(np.float64), _shards(shards, len(names))))
        return parts, numbers


def _shards(described: list[Any] | None, size: int) -> list[Share] | None:
    if described is None:
        return None
    return [Share(*shard) for shard in described] if described else [WHOLE] * size


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
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _log.warning("the store of torch.distributed is gone (%s): ranks are no longer combined", reason)
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
