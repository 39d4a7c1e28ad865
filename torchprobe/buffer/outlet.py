"""The way out of the training thread: transfer buffers, the drain thread, and what it learns on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic, time
from typing import Any, Protocol

from torchprobe.buffer.decode import SKIPPED_STEPS, Decoder
from torchprobe.buffer.drain import Drain
from torchprobe.buffer.step import StepBuffer, TransferBuffers
from torchprobe.records import Value

_LEAST = 0.1  # of the longest stretch


@dataclass(frozen=True, slots=True)
class Outlet:
    """Takes over complete steps, and wakes the drain thread every `flush_every` of them."""

    transfers: TransferBuffers
    drain: Drain
    decoder: Decoder
    flush_every: int

    def hand_over(self, step: int, buffer: StepBuffer, at: float | None = None) -> None:
        """Start the copies of a step and queue it. Never blocks; a step for which there is no room is counted.

        The buffer is not to be filled any more: what comes later for the step goes in another one, in which a tag
        that the step has already is left out. at: when it ended, in seconds since the epoch; by default now. Most steps
        have host values alone: these go to `Drain.put_values`.
        """
        wake = buffer.urgent or step == 1 or step % self.flush_every == 0
        if buffer and self.drain.admit():
            sent = self.transfers.send(step, at or time(), buffer)
            self.drain.put(sent)
            wake = wake or ((bool(sent.transfers) or sent.lost) and self.transfers.crowded)
        if wake:
            self.drain.wake()

    @property
    def faults(self) -> list[str]:
        """What was lost or left out so far, a short line each."""
        return [*self.drain.faults, *self.decoder.faults]

    def state_dict(self) -> dict[str, Any]:
        """What was lost so far, for the counters of a resumed run."""
        return {"skipped": self.decoder.skipped, "dropped": self.drain.dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from there."""
        self.decoder.resume(int(state["skipped"]))
        self.drain.count_dropped(int(state["dropped"]))


class Spent(Protocol):
    """What the training thread spends on torchprobe."""

    @property
    def seconds(self) -> float:
        """So far."""


class Overview:
    """The tags `overview/probe_overhead`, since they were written last, `dropped_records` and `skipped_steps`."""

    def __init__(self, outlet: Outlet, meter: Spent) -> None:
        self._outlet = outlet
        self._meter = meter
        self._reported = (monotonic(), meter.seconds)
        self._longest = 0.0  # seconds between two reports

    def values(self, skipped: int) -> dict[str, Value]:
        """Values by tag; skipped: steps that the host knows to be skipped, to which the decoder adds the others."""
        return {
            **self._overhead(),
            "overview/dropped_records": float(self._outlet.drain.dropped),
            SKIPPED_STEPS: float(skipped),
        }

    def _overhead(self) -> dict[str, Value]:
        """Nothing for a stretch far shorter than others, as at the end: the last step's share would be most of it."""
        now, spent = monotonic(), self._meter.seconds
        seconds, probing = now - self._reported[0], spent - self._reported[1]
        if seconds < _LEAST * self._longest:
            return {}
        self._longest, self._reported = max(self._longest, seconds), (now, spent)
        return {"overview/probe_overhead": min(1.0, probing / max(seconds, 1e-9))}
