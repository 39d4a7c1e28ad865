"""The one background thread: waits for copies, makes records, hands batches to the writer."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from torchprobe.buffer.seal import Sealed
from torchprobe.records import Record
from torchprobe.writers.protocol import Writer

_log = logging.getLogger("torchprobe")

MAX_WAITING = 10_000  # sealed steps, or records that the writer has not taken: about 10 MB of scalars
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0  # seconds between attempts while the writer fails


class Drain:
    """Takes sealed steps off the training thread's hands; never makes it wait, never lets it fail.

    decode: turns a sealed step into a record (None to leave it out). flush_seconds: the longest that
    a step stays unwritten. What cannot be kept is dropped and counted in `dropped`.
    """

    def __init__(self, writer: Writer, decode: Callable[[Sealed], Record | None], flush_seconds: float) -> None:
        self._writer = writer
        self._decode = decode
        self._flush_seconds = flush_seconds
        self._sealed: deque[Sealed] = deque()
        self._records: deque[Record] = deque()
        self._wake = threading.Condition()
        self._asked = self._answered = 0  # flush requests and the last one that was served
        self._urgent = self._failing = False
        self._closing = False
        self._retry_at = 0.0
        self._retry_wait = _FIRST_RETRY
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="torchprobe-drain", daemon=True)
        self._thread.start()

    def admit(self) -> bool:
        """Whether there is room for one more step; when there is none, counts it as dropped."""
        full = len(self._sealed) >= MAX_WAITING
        self.dropped += full
        return not full

    def put(self, sealed: Sealed) -> None:
        """Queue an admitted step for the next flush. Never blocks."""
        self.dropped += sealed.lost
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
        """Write what was put before. False when time runs out or the writer fails."""
        asked = self.wake(urgent=True)
        with self._wake:
            served = self._wake.wait_for(lambda: self._answered >= asked or not self._thread.is_alive(), timeout)
            return served and self._answered >= asked and not self._failing

    def close(self, timeout: float | None = None) -> bool:
        """Flush, stop the thread and close the writer. False when something was left unwritten."""
        self._closing = True
        written = self.flush(timeout)
        self._thread.join(timeout)
        return written and not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            asked, urgent = self._wait()
            self._collect()
            self._write(urgent)
            with self._wake:
                self._answered = asked
                self._wake.notify_all()
            if self._closing:
                return self._finish()

    def _wait(self) -> tuple[int, bool]:
        with self._wake:
            self._wake.wait_for(lambda: self._asked > self._answered or self._closing, self._flush_seconds)
            urgent, self._urgent = self._urgent, False
            return self._asked, urgent

    def _collect(self) -> None:
        while self._sealed:
            try:
                record = self._decode(self._sealed.popleft())
            except Exception:
                self.dropped += 1
                _log.exception("a step could not be read back and is dropped")
                continue
            if record is not None:
                self._records.append(record)
        while len(self._records) > MAX_WAITING:
            self._records.popleft()
            self.dropped += 1

    def _write(self, urgent: bool) -> None:
        if not self._records or (self._failing and not urgent and monotonic() < self._retry_at):
            return
        batch = list(self._records)
        try:
            self._writer.write(batch)
        except Exception:
            self._put_off()
        else:
            self._failing, self._retry_wait = False, _FIRST_RETRY
            self._records.clear()

    def _put_off(self) -> None:
        if not self._failing:
            _log.exception("writing failed; records are kept and tried again, training goes on")
        self._failing = True
        self._retry_at = monotonic() + self._retry_wait
        self._retry_wait = min(2 * self._retry_wait, _LAST_RETRY)

    def _finish(self) -> None:
        self.dropped += len(self._records)
        if self._records:
            _log.error("%d records could not be written and are lost", len(self._records))
        try:
            self._writer.close()
        except Exception:
            _log.exception("closing the writer failed")
