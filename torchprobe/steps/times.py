"""What goes with the record of a step about its times, and records that wait until these can be read."""

from __future__ import annotations

import math
from dataclasses import replace
from time import time

import torch

from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import Piece, StepBuffer
from torchprobe.capture.times import Stopwatch, Timing
from torchprobe.probes.base import Reporter
from torchprobe.probes.performance import RATES, SPANS, STEP_SECONDS, driver_is_there
from torchprobe.steps.open_step import OpenStep

_PATIENCE = 16  # steps for which the events of one may lag behind


class StepTimes:
    """Ends the timing of steps, and hands records over: at once, unless one's times cannot be read yet.

    ranks: of the run; with several, each sends its own times.
    """

    def __init__(self, reporter: Reporter, watch: Stopwatch, outlet: Outlet, ranks: int) -> None:
        self.gate = reporter.gate
        self.holds = False
        """Whether a record has to go by way of `hand_over`."""
        self._reporter, self._watch, self._outlet, self._ranks = reporter, watch, outlet, ranks
        self._by_hand = False  # the user has ended a step before
        self._timing: Timing | None = None  # of the record that comes next
        self._held: list[tuple[int, StepBuffer, float, Timing | None]] = []

    def end_step(self, step: OpenStep, before: float | None, by_hand: bool) -> float | None:
        """A step is over, of those that are timed, that several ranks have or that the user ends: when that was.

        before: when the one before it was. by_hand: the user ends it now.
        """
        at = step.ended
        if by_hand:
            at, before, self._by_hand = self._watch.meter.clock, before if self._by_hand else None, True
            self._watch.mark_end(step.number)
        seconds = math.nan if at is None or before is None else at - before
        timing = self._watch.close(seconds, step.forwards, not step.due)
        if timing is not None:
            self._timing, self.holds = timing, True
        elif not math.isnan(seconds):
            self._put(step, seconds)
        return at

    def _put(self, step: OpenStep, seconds: float) -> None:
        if self._ranks == 1:
            step.put(STEP_SECONDS, seconds)
        else:
            unknown = [math.nan] * (len(SPANS) + 1)
            rates = [math.nan] * len(RATES)
            step.extend([self._rows([seconds, *unknown, float(self._ranks), time(), *rates, 1.0])])

    def hand_over(self, step: int, buffer: StepBuffer) -> None:
        """One more record; those that wait go in order, each once its times can be read."""
        self._held.append((step, buffer, time(), self._timing))
        self._timing = None
        while self._held:
            known = self._known(self._held[0][-1])
            if not (known or self.gate.failed or buffer.urgent or len(self._held) > _PATIENCE):
                break
            self._hand_over_first(known)
        self.holds = bool(self._held)

    def release(self) -> None:
        """Hand all over that waits; times that cannot be read yet are left out."""
        while self._held:
            self._hand_over_first(self._known(self._held[0][-1]))
        self._timing, self.holds = None, False

    def _hand_over_first(self, known: bool) -> None:
        step, buffer, at, timing = self._held.pop(0)
        if timing is not None:
            asks = timing.watch is not None and timing.watch.device is not None and driver_is_there()
            with self.gate.boundary():
                pieces = [*buffer.pieces, self._rows(timing.row(known))]
                buffer = replace(buffer, pieces=pieces, urgent=buffer.urgent or asks)
        self._outlet.hand_over(step, buffer, at)

    def _known(self, timing: Timing | None) -> bool:
        if timing is None:
            return True
        with self.gate.boundary():
            return not self.gate.failed and timing.known
        return False  # the boundary took an exception

    def _rows(self, values: list[float]) -> Piece:
        return Piece(self._reporter, ["performance/step"], torch.tensor([values], dtype=torch.float64, device="cpu"))
