"""A curve in one line of text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BARS = "▁▂▃▄▅▆▇█"
ROUNDING = 1e-6  # of a value: float32 numbers that are nearer to each other are the same
_NOT_FINITE = "!"


def sparkline(values: NDArray[np.float64], width: int = 24) -> str:
    """The course of values as at most `width` bars, each the mean of its share; ! where one is not finite."""
    if not values.size:
        return ""
    shares = np.array_split(values, min(width, values.size))
    means = np.array([share.mean() for share in shares])
    finite = means[np.isfinite(means)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scale = (len(BARS) - 1) / (high - low) if high - low > ROUNDING * max(abs(high), abs(low)) else 0.0
    return "".join(BARS[round((m - low) * scale)] if np.isfinite(m) else _NOT_FINITE for m in means.tolist())
