"""The way out of the training thread: device slots, the drain thread, and what it learns on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import time
from typing import Any

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Drain
from torchprobe.buffer.seal import Lanes
from torchprobe.buffer.step import StepBuffer


@dataclass(frozen=True, slots=True)
class Outlet:
    """Takes over complete steps, and wakes the drain thread every `flush_every` of them."""

    lanes: Lanes
    drain: Drain
    decoder: Decoder
    flush_every: int

    def hand_over(self, step: int, buffer: StepBuffer) -> None:
        """Start the copies of a step and queue it. Never blocks; a step for which there is no room is counted."""
        if buffer and self.drain.admit():
            self.drain.put(self.lanes.seal(step, time(), buffer))
        if buffer.urgent or step == 1 or step % self.flush_every == 0 or self.lanes.crowded:
            self.drain.wake()

    def state_dict(self) -> dict[str, Any]:
        """What was lost so far, for the counters of a resumed run."""
        return {"skipped": self.decoder.skipped, "dropped": self.drain.dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from there."""
        self.decoder.skipped = int(state["skipped"])
        self.drain.count_dropped(int(state["dropped"]))
