"""Rules about what does not happen: no step for long, and a probe that sees nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

from torchprobe.records import Record, Text
from torchprobe.rules.alert import Alert
from torchprobe.rules.base import BuiltIn, Found

_NOTHING = "nothing_captured/"  # + probe: Text that says why


@dataclass(frozen=True)
class Stalled(BuiltIn):
    """No step, and no forward pass of a validation, for `seconds`. Source: SageMaker Debugger.

    Looked at each time that the drain thread wakes up: at least every `flush_seconds`. clock: a monotonic time in
    seconds.
    """

    seconds: float = 1800.0
    clock: Callable[[], float] = time.monotonic

    name = "stalled"

    def watcher(self) -> _StalledWatcher:
        """From now on, for one run."""
        return _StalledWatcher(self)


@dataclass(frozen=True)
class NothingCaptured(BuiltIn):
    """A requested probe saw nothing in its first three sampled steps; the message says which and why.

    Reads the texts `nothing_captured/<Probe>`. Of the default probes, one that a model need not have anything for
    (attention, say) is not reported.
    """

    name = "nothing_captured"

    def watcher(self) -> Callable[[Record], Found]:
        """Keeps what it has found: these alerts do not end."""
        return partial(self._look, [])

    def _look(self, found: list[Alert], record: Record) -> Found:
        found += [
            Alert(self.name, record.step, tag.removeprefix(_NOTHING), 0.0, None, value.markdown)
            for tag, value in record.values.items()
            if tag.startswith(_NOTHING) and isinstance(value, Text)
        ]
        return found or None


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
        message = f"no step for {idle / 60:.0f} minutes"
        return [Alert(self._rule.name, step, None, idle, self._rule.seconds, message)]
