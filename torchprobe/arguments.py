"""Checks of what a user passes to `instrument`: each error names the argument, what it got and what it takes."""

from __future__ import annotations


def checked_budget(fraction: float | None) -> float | None:
    """A fraction of wall time, or None. Raises TypeError or ValueError for anything else."""
    if fraction is None:
        return None
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"overhead_budget={fraction!r}: takes a fraction of wall time, such as 0.01")
    if not 0 < fraction <= 1:
        raise ValueError(f"overhead_budget={fraction}: takes a fraction of wall time between 0 and 1, such as 0.01")
    return fraction


def check_seconds(argument: str, value: float) -> None:
    """Raise unless `value` is a number of seconds above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}={value!r}: takes seconds, not {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{argument}={value}: takes a number of seconds above 0")
