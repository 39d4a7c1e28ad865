"""The last values of a series, and how far the next one is from them."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean

_ROUNDING = 1e-6  # of the mean: what float32 losses of one and the same model differ by


class Window:
    """The last `size` finite values of a series."""

    def __init__(self, size: int) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def full(self) -> bool:
        """Whether there are as many values as there can be."""
        return len(self._values) == self._values.maxlen

    def add(self, value: float) -> None:
        """Take the next value, unless it is NaN or inf."""
        if math.isfinite(value):
            self._values.append(value)

    def limit(self, deviations: float) -> float:
        """So many standard deviations above the mean; a constant series allows for rounding."""
        mean = fmean(self._values)
        variance = fmean((value - mean) ** 2 for value in self._values)
        return mean + deviations * max(math.sqrt(variance), _ROUNDING * abs(mean))

    def largest(self) -> float:
        """The largest value. Raises ValueError when there is none."""
        return max(self._values)
