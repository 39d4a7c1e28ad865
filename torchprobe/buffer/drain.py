"""The one background thread: waits for copies, makes records, hands batches to the writer."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from torchprobe.buffer.backlog import Backlog
from torchprobe.buffer.exchange import Exchange
from torchprobe.buffer.seal import Sealed
from torchprobe.buffer.stage import Guarded, Stage
from torchprobe.records import Record
from torchprobe.writers.protocol import Writer

_log = logging.getLogger("torchprobe")

MAX_WAITING = 10_000  # sealed steps


class Drain:
    """Takes sealed steps off the training thread's hands; never makes it wait, never lets it fail.

    decode: turns a sealed step into a record (None to leave it out). stage: sees each record before it is
    written. flush_seconds: the longest that a step stays unwritten while the disk is well. What cannot be
    kept is dropped and counted.
    exchange: other ranks, when there are any; then `decode` keeps steps back, and `exchange` releases them.
    """

    def __init__(
        self,
        writer: Writer,
        decode: Callable[[Sealed], Record | None],
        flush_seconds: float,
        stage: Stage | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._decode = decode
        self._stage = Guarded(stage)
        self._exchange = exchange
        self._flush_seconds = flush_seconds
        self._sealed: deque[Sealed] = deque()
        self._backlog = Backlog(writer)
        # Counted by one thread each, so that no lock is needed.
        self._turned_away = self._unread = 0
        # Guards what follows, and is never held while copying, decoding or writing.
        self._wake = threading.Condition()
        self._asked = self._served = self._written = 0  # numbers of flush requests
        self._urgent = self._closing = self._ended = self._clean = False
        self._thread = threading.Thread(target=self._run, name="torchprobe-drain", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Steps and records lost so far, in whole or in part."""
        lost = 0 if self._exchange is None else self._exchange.dropped
        return self._turned_away + self._unread + self._backlog.dropped + lost

    @property
    def ranks(self) -> list[str]:
        """A line on the other ranks for a person, when there are any."""
        words = "" if self._exchange is None else self._exchange.summary()
        return [f"  ranks             {words}"] if words else []

    def admit(self) -> bool:
        """Whether there is room for one more step; when there is none, counts it as dropped. Never blocks."""
        full = self._ended or len(self._sealed) >= MAX_WAITING
        self._turned_away += full
        return not full

    def count_dropped(self, number: int) -> None:
        """Losses of the process that this one goes on for."""
        self._turned_away += number

    def put(self, sealed: Sealed) -> None:
        """Queue an admitted step for the next flush. Never blocks."""
        self._turned_away += sealed.lost
        self._sealed.append(sealed)

    def wake(self, urgent: bool = False) -> int:
        """Ask for a flush without waiting; the number says which request it was.

        urgent: try to write now, even while waiting to retry a writer that failed.
        """
        with self._wake:
            self._asked += 1
            self._urgent |= urgent
            self._wake.notify_all()
            return self._asked

    def flush(self, timeout: float | None = None) -> bool:
        """Write what was put before; True when it is written.

        Waits up to `timeout` seconds, or as long as it takes. False when time runs out, the writer fails
        or the drain is closed; at once in the drain thread itself, which a garbage collection can run.
        """
        asked = self.wake(urgent=True)
        with self._wake:
            if self._thread is not threading.current_thread():
                self._wake.wait_for(lambda: self._served >= asked or self._ended, self._longest(timeout))
            return self._written >= asked

    def close(self, timeout: float | None = None) -> bool:
        """Write what was put before, stop the thread and close the writer. Safe to call twice.

        Waits up to `timeout` seconds in all, or as long as it takes. False when something was left
        unwritten; then a thread that hangs in the writer is left behind, which no exit waits for.
        """
        self._closing = True
        self.wake(urgent=True)
        if self._thread is threading.current_thread():
            return False
        self._thread.join(self._longest(timeout))
        return self._clean

    def _run(self) -> None:
        try:
            while not self._cycle():
                pass
        finally:
            self._unread += len(self._sealed)
            if self._exchange is not None:
                self._exchange.close()
            self._stage.close()
            closed = self._backlog.close()
            with self._wake:
                self._clean = closed and self._written == self._served
                self._ended = True
                self._wake.notify_all()

    def _cycle(self) -> bool:
        """Serve the requests made so far. True when the drain is closing and this was the last time."""
        asked, urgent, closing = self._wait()
        dropped = self._unread + self._backlog.dropped
        self._collect()
        self._release(urgent or closing)
        written = self._backlog.write(urgent) and dropped == self._unread + self._backlog.dropped
        with self._wake:
            self._served = asked
            if written:
                self._written = asked
            self._wake.notify_all()
        return closing

    def _wait(self) -> tuple[int, bool, bool]:
        pauses = [self._backlog.pause(), None if self._exchange is None else self._exchange.pause()]
        seconds = min([self._flush_seconds, *(pause for pause in pauses if pause is not None)])
        with self._wake:
            self._wake.wait_for(lambda: self._asked > self._served or self._closing, _waitable(seconds))
            urgent, self._urgent = self._urgent, False
            return self._asked, urgent, self._closing

    def _collect(self) -> None:
        for _ in range(len(self._sealed)):  # not those that arrive meanwhile: a fast loop would never be written
            record = self._read(self._sealed.popleft())
            if record is not None:
                self._backlog.add(self._stage(record))
        rest = self._stage.at_rest()
        if rest is not None:
            self._backlog.add(rest)

    def _release(self, urgent: bool) -> None:
        if self._exchange is None:
            return
        try:
            for record in self._exchange.release(urgent):
                self._backlog.add(self._stage(record))
        except Exception:
            self._unread += 1
            _log.exception("combining values of several ranks failed; training goes on")

    def _longest(self, timeout: float | None) -> float | None:
        """What a caller waits at most, in a form that the system knows."""
        patience = None if self._exchange is None else self._exchange.patience
        if patience is not None:
            timeout = patience if timeout is None else min(timeout, patience)
        return _waitable(timeout)

    def _read(self, sealed: Sealed) -> Record | None:
        try:
            return self._decode(sealed)
        except Exception:
            self._unread += 1
            if self._unread == 1:
                _log.exception("step %d could not be read back and is dropped; training goes on", sealed.step)
            return None


def _waitable(timeout: float | None) -> float | None:
    """The longest wait that the system knows, for `math.inf` and its like."""
    return None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
