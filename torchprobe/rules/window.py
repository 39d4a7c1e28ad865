"""The last values of a series, and how far the next one is from them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

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

    def state_dict(self) -> dict[str, list[float]]:
        """The values, oldest first."""
        return {"values": list(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these values."""
        self._values.clear()
        self._values.extend(map(float, state["values"]))

    def largest(self) -> float:
        """The largest value. Raises ValueError when there is none."""
        return max(self._values)
