"""The way out of the training thread: device slots, the drain thread, and what it learns on the host."""

from __future__ import annotations

from dataclasses import dataclass
from time import time

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
