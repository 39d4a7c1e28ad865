"""The way of records from the decoder to the writer: what they pass, what waits, and what went wrong."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Set as AbstractSet
from dataclasses import replace
from time import monotonic
from typing import Protocol

from torchprobe.messages import log as _log
from torchprobe.records import Record
from torchprobe.writers.protocol import Writer

MAX_RECORDS = 10_000
MAX_VALUES = 500_000  # in all records together; a scalar with its tag takes 140 bytes
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0  # seconds between attempts while the disk fails


class Stage(Protocol):
    """Sees every record in the drain thread, in order, and may add to it. Takes no lock and must not block for long.

    One that raises is taken out, with one traceback in the log.
    """

    def __call__(self, record: Record) -> Record:
        """The record to write."""

    def at_rest(self) -> Record | None:
        """All records so far have passed: one more to write, or None. Called at least every `flush_seconds`."""

    def close(self) -> None:
        """Nothing more will come."""


class Faults:
    """What went wrong between device and file: each kind is counted, and logged once with its traceback."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, error: BaseException, message: str, *arguments: object) -> None:
        """One more of a kind. message: for the log, where the exception's type follows it."""
        self._counts[kind] += 1
        if kind not in self._first:
            self._first[kind] = type(error).__name__
            _log.error(f"{message} (%s)", *arguments, type(error).__name__, exc_info=error)

    @property
    def lines(self) -> list[str]:
        """A short line for each kind, with the type of the first exception."""
        return [f"{kind}: {self._counts[kind]} ({name})" for kind, name in list(self._first.items())]


class Repeats:
    """Leaves out what a step has in the file already: no tag twice for one step, and no step before its last one.

    TensorBoard else shows one of the two values, or erases the later steps of the tag. Remembers the last two steps.
    """

    def __init__(self) -> None:
        self._tags: dict[int, AbstractSet[str]] = {}  # of the last two steps

    def without(self, record: Record) -> Record | None:
        """The record without what is there already; None when nothing is left."""
        back = len(self._tags) > 1 and record.step < min(self._tags)  # the clock was set back
        noted = [tags for step, tags in self._tags.items() if step >= record.step and not back]
        repeated = frozenset().union(*noted) & record.values.keys()
        if not repeated:
            return record
        _log.debug("step %d has %s already: a later value is left out", record.step, ", ".join(sorted(repeated)))
        values = {tag: value for tag, value in record.values.items() if tag not in repeated}
        return replace(record, values=values) if values else None

    def note(self, record: Record) -> None:
        """The record goes to the writer."""
        step, tags = record.step, record.values.keys()
        if len(self._tags) > 1 and step < min(self._tags):  # the clock was set back
            self._tags.clear()
        self._tags[step] = self._tags[step] | tags if step in self._tags else tags
        if len(self._tags) > 2:
            del self._tags[min(self._tags)]


class Backlog:
    """Hands records to the writer in order; used by the drain thread alone.

    An OSError may pass (a full disk): the records stay, oldest dropped first beyond MAX_RECORDS or
    MAX_VALUES, and are tried again with growing pauses. Any other exception, SystemExit too, comes from a record that
    would never be taken: it alone is dropped. `dropped` counts both.
    """

    def __init__(self, writer: Writer, faults: Faults | None = None) -> None:
        self.dropped = 0
        self._writer = writer
        self._faults = faults or Faults()
        self._records: deque[Record] = deque()
        self._retry_at: float | None = None  # while the disk fails
        self._pause = _FIRST_RETRY
        self._trimmed = False

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
            except OSError as error:
                self._put_off(error)
        if self._records:
            self._trim()
        elif self._retry_at is not None:
            _log.warning("writing works again: what was kept is written (%d records dropped so far)", self.dropped)
            self._retry_at, self._pause = None, _FIRST_RETRY
        return not self._records

    def close(self) -> bool:
        """Give up what waits and close the writer. False when that failed or something was given up."""
        if self._records:
            _log.error("%d records could not be written and are lost", len(self._records))
        self.dropped += len(self._records)
        try:
            self._writer.close()
        except BaseException as error:
            self._faults.add("the writer could not be closed", error, "closing the writer failed")
            return False
        return not self._records

    def _hand_over(self) -> None:
        try:
            self._writer.write(list(self._records))
        except OSError:
            raise
        except BaseException as error:
            dropped = self.dropped
            self._hand_over_each()
            if self.dropped == dropped:
                self._faults.add("failed writes", error, "a write failed, and not when it was tried again by records")
        else:
            self._records.clear()

    def _hand_over_each(self) -> None:
        while self._records:
            step = self._records[0].step
            try:
                self._writer.write([self._records[0]])
            except OSError:
                raise
            except BaseException as error:
                self.dropped += 1
                message = "the writer cannot take the record of step %d, which is dropped; training goes on"
                self._faults.add("records that the writer refused", error, message, step)
            self._records.popleft()

    def _put_off(self, error: OSError) -> None:
        if self._retry_at is None:
            message = "writing failed; records are kept and tried again, training goes on"
            _log.error(f"{message} (%s)", type(error).__name__, exc_info=error)
        self._retry_at = monotonic() + self._pause
        self._pause = min(2 * self._pause, _LAST_RETRY)

    def _trim(self) -> None:
        values = sum(len(record.values) for record in self._records)
        before = self.dropped
        while len(self._records) > MAX_RECORDS or values > MAX_VALUES:
            values -= len(self._records.popleft().values)
            self.dropped += 1
        if self.dropped > before and not self._trimmed:
            self._trimmed = True
            _log.error("records that cannot be written fill their bound: the oldest ones are dropped from now on")
