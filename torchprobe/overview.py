"""What torchprobe says of itself: its share of the time, and what was lost or skipped."""

from __future__ import annotations

from time import monotonic

from torchprobe.buffer.outlet import Outlet
from torchprobe.capture.gate import Meter
from torchprobe.records import Value

_LEAST = 0.1  # of the longest stretch


class Overview:
    """The tags `overview/probe_overhead`, since they were written last, `dropped_records` and `skipped_steps`."""

    def __init__(self, outlet: Outlet, meter: Meter) -> None:
        self._outlet = outlet
        self._meter = meter
        self._reported = (monotonic(), meter.seconds)
        self._longest = 0.0  # seconds between two reports

    def values(self, skipped: int) -> dict[str, Value]:
        """Values by tag; skipped: steps that the host knows to be skipped."""
        return {
            **self._overhead(),
            "overview/dropped_records": float(self._outlet.drain.dropped),
            "overview/skipped_steps": float(skipped + self._outlet.decoder.skipped),
        }

    def _overhead(self) -> dict[str, Value]:
        """Nothing for a stretch far shorter than others, as at the end: the last step's share would be most of it."""
        now, spent = monotonic(), self._meter.seconds
        seconds, probing = now - self._reported[0], spent - self._reported[1]
        if seconds < _LEAST * self._longest:
            return {}
        self._longest, self._reported = max(self._longest, seconds), (now, spent)
        return {"overview/probe_overhead": min(1.0, probing / max(seconds, 1e-9))}
