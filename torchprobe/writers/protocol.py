"""What the drain thread asks of anything that stores records, and the simplest such things: nothing, and memory."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Sequence
from numbers import Real
from typing import Protocol, runtime_checkable

from torchprobe.records import Histogram, Record, Value


@runtime_checkable
class Writer(Protocol):
    """Stores records. Called from one background thread only, never from the training thread.

    An OSError from `write` means "not now": the caller keeps the batch and tries again later, so nothing of it may
    have been stored. After any other exception records are handed over one by one, and those that fail are dropped.

    A writer may have a method `restart(step)`: called once, before the first `write` of a resumed run, whose first
    record can be of this step. Whatever an earlier process wrote from there on is void.
    """

    def write(self, records: Sequence[Record]) -> None:
        """Take a batch of records, in step order; afterwards they survive a killed process."""

    def close(self) -> None:
        """Release files. Called once, after the last `write`."""


def restart(writer: Writer, step: int) -> None:
    """Tell a writer that can act on it that the run was resumed, and at which step it begins."""
    method = getattr(writer, "restart", None)
    if method is not None:
        method(step)


class NoWriter:
    """Stores nothing: that of a rank other than 0, and where rules alone are asked."""

    def write(self, records: Sequence[Record]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is open."""


class MemoryWriter:
    """Keeps every record: the test double. Written by one thread, it may be read from any other at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[Record] = []
        self.closed = False
        """Whether `close` was called."""

    def write(self, records: Sequence[Record]) -> None:
        """Keep a batch."""
        with self._lock:
            self._records.extend(records)

    def close(self) -> None:
        """Remember that nothing more will come; what was written stays readable."""
        self.closed = True

    @property
    def records(self) -> list[Record]:
        """Everything written so far, in the order of writing; a new list."""
        with self._lock:
            return list(self._records)

    def tags(self) -> list[str]:
        """Every tag written so far, sorted."""
        return sorted({tag for record in self.records for tag in record.values})

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        """The (step, value) pairs of a scalar tag; empty when there are none."""
        return [(step, float(value)) for step, value in self._series(tag) if isinstance(value, Real)]

    def histograms(self, tag: str) -> list[tuple[int, Histogram]]:
        """The (step, histogram) pairs of a tag; empty when there are none."""
        return [(step, value) for step, value in self._series(tag) if isinstance(value, Histogram)]

    def value(self, tag: str, step: int | None = None) -> Value:
        """The value of a tag at a step, or the latest one.

        Raises KeyError, naming the nearest tags or the steps that there are.
        """
        series = self._series(tag)
        if not series:
            near = difflib.get_close_matches(tag, self.tags(), n=5, cutoff=0.4)
            hint = f"near ones: {', '.join(near)}" if near else f"tags written: {', '.join(self.tags()[:20]) or 'none'}"
            raise KeyError(f"no value was written under tag {tag!r}; {hint}")
        found = [value for at, value in series if step in (None, at)]
        if not found:
            raise KeyError(f"tag {tag!r} has no value at step {step}; its steps: {[at for at, _ in series]}")
        return found[-1]

    def _series(self, tag: str) -> list[tuple[int, Value]]:
        return [(record.step, record.values[tag]) for record in self.records if tag in record.values]
