"""Which handed-over steps of two ranks are the same one."""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """A place in the order of what a rank hands over."""

    restart: int
    """How often step numbers began anew, as after forward passes that turned out to be no training."""
    step: int
    part: int
    """0 for a step's first record; more for what is logged to a step that was handed over already."""


class Numbering:
    """Gives each step that is handed over its key; two ranks that do the same get the same keys."""

    def __init__(self) -> None:
        self._last = Key(0, 0, 0)

    def next(self, step: int) -> Key:
        """The key of the step that is handed over now; keys increase."""
        restart, last, part = self._last
        if step > last:
            self._last = Key(restart, step, 0)
        else:
            self._last = Key(restart, step, part + 1) if step == last else Key(restart + 1, step, 0)
        return self._last
