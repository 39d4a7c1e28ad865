"""Places in a fixed buffer, given out and taken back in order."""

from __future__ import annotations

from collections import deque


class Ring:
    """Contiguous ranges of a buffer of `capacity` elements, first in, first out.

    Another thread may call `release`, and only that. No lock is shared, so that neither waits for the other.
    A range of up to half of what is free always finds room; a larger one if it does so in one run.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # (start, end) of the ranges that are out, oldest first. Positions count on beyond the end of the
        # buffer; modulo capacity they are places in it.
        self._out: deque[tuple[int, int]] = deque()

    def reserve(self, size: int) -> int | None:
        """The start of a free range of `size` elements, or None when there is no room."""
        oldest, start = self._span()
        if start % self.capacity + size > self.capacity:
            start += self.capacity - start % self.capacity
        if start + size > oldest + self.capacity:
            return None
        self._out.append((start, start + size))
        return start % self.capacity

    def cancel(self) -> None:
        """Undo the last `reserve`, before another thread hears of the range."""
        self._out.pop()

    def release(self) -> None:
        """Give back the range that was reserved first."""
        self._out.popleft()

    @property
    def crowded(self) -> bool:
        """Whether more than half of the buffer is taken: time to drain."""
        oldest, newest = self._span()
        return 2 * (newest - oldest) > self.capacity

    def _span(self) -> tuple[int, int]:
        """Where the ranges that are out begin and end; with none, positions start anew."""
        try:
            return self._out[0][0], self._out[-1][1]
        except IndexError:
            return 0, 0
