"""Places in a fixed buffer, given out and taken back in order."""

from __future__ import annotations

from collections import deque


class Ring:
    """Contiguous ranges of a buffer of `capacity` elements, first in, first out.

    One thread calls `reserve` and `cancel`, another `release`. There is no lock that one could hold while
    the other waits: each thread moves a position of its own. A range of up to half of what is free always
    finds room; a larger one when the two ends of the buffer leave it room in one run.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # Elements given out and taken back so far, with those skipped at the buffer's end.
        self._head = self._tail = 0
        self._heads: deque[int] = deque()  # `_head` after each range that is out

    def reserve(self, size: int) -> int | None:
        """The start of a free range of `size` elements, or None when there is no room."""
        if not self._heads:  # nothing is out, so that the other thread leaves `_tail` alone
            self._head = self._tail = 0
        start = self._head
        if start % self.capacity + size > self.capacity:
            start += self.capacity - start % self.capacity
        if start + size > self._tail + self.capacity:
            return None
        self._head = start + size
        self._heads.append(self._head)
        return start % self.capacity

    def cancel(self, size: int) -> None:
        """Undo the last `reserve`, of this size, before another thread hears of the range."""
        self._head = self._heads.pop() - size

    def release(self) -> None:
        """Give back the range that was reserved first."""
        self._tail = self._heads[0]  # before it leaves the deque: an empty deque lets `reserve` set `_tail`
        self._heads.popleft()

    @property
    def crowded(self) -> bool:
        """Whether more than half of the buffer is taken: time to drain."""
        return 2 * (self._head - self._tail) > self.capacity
