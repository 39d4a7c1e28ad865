"""What torchprobe says of itself: its share of the time, and what was lost or skipped."""

from __future__ import annotations

from time import monotonic

from torchprobe.buffer.outlet import Outlet
from torchprobe.capture.gate import Meter
from torchprobe.records import Value


class Overview:
    """The tags `overview/probe_overhead`, since they were written last, `dropped_records` and `skipped_steps`."""

    def __init__(self, outlet: Outlet, meter: Meter) -> None:
        self._outlet = outlet
        self._meter = meter
        self._reported = (monotonic(), meter.seconds)

    def values(self, skipped: int) -> dict[str, Value]:
        """Values by tag; skipped: steps that the host knows to be skipped."""
        now, before = (monotonic(), self._meter.seconds), self._reported
        self._reported = now
        return {
            "overview/probe_overhead": (now[1] - before[1]) / max(now[0] - before[0], 1e-9),
            "overview/dropped_records": float(self._outlet.drain.dropped),
            "overview/skipped_steps": float(skipped + self._outlet.decoder.skipped),
        }
