"""What it takes to run a sampled step again: the random state at its beginning, and the shapes of its batch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from torchprobe.random_state import random_state


@dataclass(slots=True)
class Note:
    """One step. shapes: of the tensors that the model was called with, by position or keyword."""

    step: int
    random_state: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Notes:
    """The last of them. Written by the training thread, read by any other."""

    def __init__(self, size: int = 20) -> None:
        self._notes: deque[Note] = deque(maxlen=size)

    def open(self, step: int) -> None:
        """A sampled step begins."""
        self._notes.append(Note(step, random_state()))

    def saw(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """What its model was called with."""
        if self._notes and shapes:
            self._notes[-1].shapes = shapes

    def latest(self) -> list[Note]:
        """All that are kept, oldest first."""
        return list(self._notes)
