"""What it takes to run a sampled step again: the random state at its beginning, and the shapes of its batch."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from torchprobe.random_state import random_state
from torchprobe.records import StepSnapshot


class StepSnapshots:
    """The last of them. Written by the training thread, read by any other."""

    def __init__(self, size: int = 20) -> None:
        self._snapshots: deque[StepSnapshot] = deque(maxlen=size)

    def open(self, step: int) -> None:
        """A sampled step begins."""
        self._snapshots.append(StepSnapshot(step, random_state()))

    def saw(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """What its model was called with."""
        if self._snapshots and shapes:
            self._snapshots[-1] = replace(self._snapshots[-1], shapes=shapes)

    def latest(self) -> list[StepSnapshot]:
        """All that are kept, oldest first."""
        return list(self._snapshots)
