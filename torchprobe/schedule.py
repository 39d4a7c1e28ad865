"""When a probe samples: a schedule is a callable `step -> bool`; steps count from 1."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int], bool]
"""Says whether a step is sampled. Called on the training thread when the step before has ended."""


@dataclass(frozen=True, slots=True)
class _Every:
    """A cadence; two of the same are equal, so that they are asked once."""

    steps: int

    def __call__(self, step: int) -> bool:
        return step == 1 or step % self.steps == 0


def every(steps: int) -> Schedule:
    """Step 1 and then every `steps`-th step: `every(100)` is 1, 100, 200, ..."""
    return _Every(check_count("steps", steps))


def window(first: int, last: int) -> Schedule:
    """Every step from `first` to `last`, both included."""
    check_count("first", first)
    if check_count("last", last) < first:
        raise ValueError(f"last={last} is before first={first}; a window needs first <= last")
    return lambda step: first <= step <= last


def as_schedule(argument: str, value: int | Schedule) -> Schedule:
    """A cadence given as a number of steps, or a schedule as it is."""
    return value if callable(value) else every(check_count(argument, value))


def next_active(schedule: Schedule, step: int, horizon: int = 100_000) -> int | None:
    """The first sampled step after `step`, or None when there is none within `horizon` steps."""
    following = itertools.islice(itertools.count(step + 1), horizon)
    return next((s for s in following if schedule(s)), None)


def check_count(argument: str, value: object) -> int:
    """`value` itself when it is a whole number of at least 1, else an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}={value!r}: takes a whole number of steps, 1 or more, not {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{argument}={value}: takes a whole number of steps, 1 or more (1 is every step)")
    return value
