"""A run's summary in sentences, and a curve in one line of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

BARS = "▁▂▃▄▅▆▇█"
ROUNDING = 1e-6  # of a value: float32 numbers that are nearer to each other are the same
_NOT_FINITE = "!"
_UNSEEN = ("Cc", "Cs")  # categories of Unicode


def visible(text: str) -> str:
    """Text from a file in one line: control characters, which a terminal would obey, and halves of pairs as escapes."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if category(c) in _UNSEEN else c for c in text)


def headline(summary: Mapping[str, Any]) -> str:
    """How long the run was, what recording took of it, and what there is to count."""
    seconds = summary["seconds"]
    parts = [f"{counted(summary['steps'], 'steps')} in {f'{seconds:.0f}' if seconds >= 10 else f'{seconds:.2g}'} s"]
    if summary["probe_overhead"] is not None:
        parts.append(f"{summary['probe_overhead']:.1%} of the time in probes")
    parts += [counted(count, name.replace("_", " ")) for name, count in summary["counts"].items() if count]
    return ", ".join(parts)


def stopped_early(stopped: Mapping[str, Any]) -> str:
    """That recording ended before the run did."""
    return f"Recording stopped at step {stopped['step']}: {stopped['why']}"


def listed(hparams: Mapping[str, Any]) -> str:
    """Hyperparameters in a line."""
    return ", ".join(f"{name} {plain(value)}" for name, value in hparams.items())


def plain(value: Any) -> str:
    """A hyperparameter; TensorBoard keeps whole numbers as floats."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def reason(flight: Mapping[str, Any]) -> str:
    """Why a flight recording was made: the exception's last line, or the rules."""
    lines = str(flight.get("exception") or "").strip().splitlines()
    rules = sorted({str(alert.get("rule")) for alert in flight.get("alerts") or [flight.get("alert") or {}]} - {"None"})
    found = lines[-1:] or rules
    return f" ({visible(', '.join(found))})" if found else ""


def counted(count: int, plural: str) -> str:
    """`1 alert`, `2 alerts`."""
    return f"{count} {plural.removesuffix('s') if count == 1 else plural}"


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
