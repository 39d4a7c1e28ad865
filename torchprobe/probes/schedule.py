"""When a probe samples: a schedule is a callable `step -> bool`; steps count from 1."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torchprobe.arguments import check_callable, check_count

Schedule: TypeAlias = Callable[[int], bool]
"""Says whether a step is sampled. Called on the training thread when the step begins."""

_DENSE = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True, slots=True)
class Cadence:
    """Step 1 and then every `steps`-th one; dense: also 2, 5, 10, 20 and 50 as far as they lie below `steps`.

    Two of the same are equal, so that they are asked once.
    """

    steps: int
    dense: bool = False

    def __call__(self, step: int) -> bool:
        """Whether a step is sampled."""
        return step % self.steps == 0 or step == 1 or (self.dense and step < self.steps and step in _DENSE)

    def next(self, step: int) -> int:
        """The first sampled step from `step` on."""
        if step <= 1:
            return 1
        following = -(-step // self.steps) * self.steps
        early = next((s for s in _DENSE if s >= step), following) if self.dense else following
        return early if early < self.steps else following


@dataclass(frozen=True, slots=True)
class AndBefore:
    """Each step that another schedule samples, and the one before it, in which little else is sampled."""

    other: Cadence

    def __call__(self, step: int) -> bool:
        """Whether a step is sampled."""
        return self.other(step) or self.other(step + 1)

    def next(self, step: int) -> int:
        """The first sampled step from `step` on."""
        return min(self.other.next(step), self.other.next(max(step, 1) + 1) - 1)


@dataclass(frozen=True, slots=True)
class Never:
    """No step, of its own accord."""

    def __call__(self, step: int) -> bool:
        """It is not."""
        return False

    def next(self, step: int) -> int:
        """Beyond all steps."""
        return sys.maxsize


def every(steps: int) -> Schedule:
    """Step 1 and then every `steps`-th step: `every(100)` is 1, 100, 200, ...

    After each of them some steps more are sampled (at most 8) where several optimizers take turns, until every one
    of them has stepped in a sampled step.
    """
    return Cadence(check_count("steps", steps))


def window(first: int, last: int) -> Schedule:
    """Every step from `first` to `last`, both included."""
    check_count("first", first)
    if check_count("last", last) < first:
        raise ValueError(f"last={last} is before first={first}; a window needs first <= last")
    return lambda step: first <= step <= last


def as_schedule(argument: str, value: int | Schedule) -> Schedule:
    """A cadence given as a number of steps, or a schedule as it is."""
    if not callable(value):
        return Cadence(check_count(argument, value))
    takes = "a number of steps, or a function of a step's number that says whether it is sampled"
    check_callable(argument, value, takes, "step")
    return value
