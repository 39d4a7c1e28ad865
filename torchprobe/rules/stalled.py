"""Nothing happens any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found, positive


class Stalled:
    """No step, and no forward pass of a validation, for `seconds`. Source: SageMaker Debugger.

    Looked at each time that the drain thread wakes up: at least every `flush_seconds`. clock: a monotonic time in
    seconds.
    """

    name = "stalled"

    def __init__(self, seconds: float = 1800.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = positive("seconds", seconds)
        self._clock = clock
        self._last: tuple[Hashable, float] | None = None

    def __call__(self, record: Record) -> Found:
        """Records say nothing about their absence."""
        return None

    def at_rest(self, step: int, progress: Hashable) -> Found:
        """The same progress as before, for too long?"""
        now = self._clock()
        if self._last is None or self._last[0] != progress:
            self._last = progress, now
        idle = now - self._last[1]
        if idle < self.seconds:
            return []
        message = f"no step for {idle / 60:.0f} minutes"
        return [Alert(self.name, step, None, idle, self.seconds, message)]
