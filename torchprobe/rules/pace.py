"""Rules about how fast a run goes: that it waits between its steps, or stands still."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from torchprobe.records import Record
from torchprobe.rules.base import BuiltIn, Found, Memory, scalar

_WAIT, _STEP = "performance/input_wait_seconds", "performance/step_seconds"


@dataclass(frozen=True)
class InputBound(BuiltIn):
    """From the end of a step to the next pass it takes over `share` of the median step, over the last sampled steps.

    Source: the input wait of TraceML. The wait is the median of the last `samples` sampled ones, each less what its
    step took more than the median of the last `window` steps: what is done every hundredth step alone, such as a
    checkpoint, makes no run wait. Silent below `least` seconds, and until there are `samples` of them.
    """

    share: float = 0.3
    least: float = 0.001
    samples: int = 4
    window: int = 128

    name = "input_bound"
    advice: ClassVar[str] = (
        "Training stands still while the next batch is made, or whatever else runs between two steps. Give the data "
        "loader workers that stay (num_workers, persistent_workers, pin_memory), prepare data once instead of at every "
        "step, and move logging and evaluation out of the loop's way (PyTorch, Performance Tuning Guide)."
    )

    def watcher(self) -> Memory:
        """That has seen no step."""
        return Memory(self._look)

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        step, wait = scalar(record, _STEP), scalar(record, _WAIT)
        if step is not None:
            kept["steps"] = [*kept.get("steps", ()), step][-self.window :]
        if step is None or wait is None:
            return None
        kept["waits"] = [*kept.get("waits", ()), [wait, step]][-self.samples :]
        return self._judge(record.step, kept["waits"], median(kept["steps"]))

    def _judge(self, step: int, waits: list[Any], usual: float) -> Found:
        wait = median(waited - max(0.0, took - usual) for waited, took in waits)
        if len(waits) < self.samples or not wait > max(self.share * usual, self.least):
            return []
        message = f"{wait:.3g} s of a step of {usual:.3g} s pass before its forward pass begins"
        return [self.alert(step, None, wait / usual, self.share, message)]


@dataclass(frozen=True)
class Stalled(BuiltIn):
    """No step, and no forward pass of a validation, for `seconds`. Source: SageMaker Debugger.

    Looked at each time that the drain thread wakes up: at least every `flush_seconds`. clock: a monotonic time in
    seconds.
    """

    seconds: float = 1800.0
    clock: Callable[[], float] = time.monotonic

    name = "stalled"
    patience = 1
    advice = (
        "The loop waits for something: a data worker, another rank, a lock, or a debugger. See where with `py-spy "
        "dump --pid <pid>`, and set timeouts for the data loader and the process group (py-spy, README; PyTorch, "
        "torch.distributed)."
    )

    def watcher(self) -> _StalledWatcher:
        """From now on, for one run."""
        return _StalledWatcher(self)


class _StalledWatcher:
    """Remembers since when the progress has been the same."""

    def __init__(self, rule: Stalled) -> None:
        self._rule = rule
        self._last: tuple[Hashable, float] | None = None

    def __call__(self, record: Record) -> None:
        """Records say nothing about their absence."""

    def at_rest(self, step: int, progress: Hashable) -> Found:
        """The same progress as before, for too long?"""
        now = self._rule.clock()
        if self._last is None or self._last[0] != progress:
            self._last = progress, now
        idle = now - self._last[1]
        if idle < self._rule.seconds:
            return []
        return [self._rule.alert(step, None, idle, self._rule.seconds, f"no step for {idle / 60:.0f} minutes")]
