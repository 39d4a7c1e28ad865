"""Records that the writer has not taken yet."""

from __future__ import annotations

import logging
from collections import deque
from time import monotonic

from torchprobe.records import Record
from torchprobe.writers.protocol import Writer

_log = logging.getLogger("torchprobe")

MAX_RECORDS = 10_000
MAX_VALUES = 500_000  # in all records together; a scalar with its tag takes 140 bytes
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0  # seconds between attempts while the disk fails


class Backlog:
    """Hands records to the writer in order; used by the drain thread alone.

    An OSError may pass (a full disk): the records stay, oldest dropped first beyond MAX_RECORDS or
    MAX_VALUES, and are tried again with growing pauses. Any other exception comes from a record that
    would never be taken: it alone is dropped. `dropped` counts both.
    """

    def __init__(self, writer: Writer) -> None:
        self.dropped = 0
        self._writer = writer
        self._records: deque[Record] = deque()
        self._retry_at: float | None = None  # while the disk fails
        self._pause = _FIRST_RETRY
        self._refused = False

    def add(self, record: Record) -> None:
        """Queue a record for the next `write`."""
        self._records.append(record)

    def pause(self) -> float | None:
        """Seconds until a failed write is worth another attempt; None when none has failed."""
        return None if self._retry_at is None else max(0.0, self._retry_at - monotonic())

    def write(self, urgent: bool = False) -> bool:
        """Write what waits, but not before the pause after a failure is over, unless it is urgent.

        True when nothing waits any more.
        """
        if self._records and (urgent or not self.pause()):
            try:
                self._hand_over()
            except OSError:
                self._put_off()
        if self._records:
            self._trim()
        else:
            self._retry_at, self._pause = None, _FIRST_RETRY
        return not self._records

    def close(self) -> bool:
        """Give up what waits and close the writer. False when that failed or something was given up."""
        if self._records:
            _log.error("%d records could not be written and are lost", len(self._records))
        self.dropped += len(self._records)
        try:
            self._writer.close()
        except Exception:
            _log.exception("closing the writer failed")
            return False
        return not self._records

    def _hand_over(self) -> None:
        try:
            self._writer.write(list(self._records))
        except OSError:
            raise
        except Exception:
            self._hand_over_each()
        else:
            self._records.clear()

    def _hand_over_each(self) -> None:
        while self._records:
            try:
                self._writer.write([self._records[0]])
            except OSError:
                raise
            except Exception:
                self._refuse(self._records[0].step)
            self._records.popleft()

    def _refuse(self, step: int) -> None:
        self.dropped += 1
        if not self._refused:
            self._refused = True
            _log.exception("the writer cannot take the record of step %d, which is dropped; training goes on", step)

    def _put_off(self) -> None:
        if self._retry_at is None:
            _log.exception("writing failed; records are kept and tried again, training goes on")
        self._retry_at = monotonic() + self._pause
        self._pause = min(2 * self._pause, _LAST_RETRY)

    def _trim(self) -> None:
        values = sum(len(record.values) for record in self._records)
        while len(self._records) > MAX_RECORDS or values > MAX_VALUES:
            values -= len(self._records.popleft().values)
            self.dropped += 1
