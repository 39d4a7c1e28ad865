"""Places in a fixed buffer, given out and taken back in order."""

from __future__ import annotations

from collections import deque
from threading import Lock


class Ring:
    """Contiguous ranges of a buffer of `capacity` elements, first in, first out.

    `reserve` is called by one thread and `release` by another; neither waits for the other's work.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: deque[tuple[int, int]] = deque()
        self._lock = Lock()

    def reserve(self, size: int) -> int | None:
        """The start of a free range of `size` elements, or None when there is no room."""
        with self._lock:
            start = self._free_start(size)
            if start is not None:
                self._taken.append((start, start + size))
            return start

    def release(self) -> None:
        """Give back the range that was reserved first."""
        with self._lock:
            self._taken.popleft()

    @property
    def crowded(self) -> bool:
        """Whether more than half of the buffer is taken: time to drain."""
        with self._lock:
            return 2 * sum(end - start for start, end in self._taken) > self.capacity

    def _free_start(self, size: int) -> int | None:
        if not self._taken:
            return 0 if size <= self.capacity else None
        oldest, head = self._taken[0][0], self._taken[-1][1]
        if head > oldest:  # taken in one run: room behind it, or before it
            if head + size <= self.capacity:
                return head
            return 0 if size <= oldest else None
        return head if head + size <= oldest else None
