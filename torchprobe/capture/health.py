"""What the alert rules need beyond the probes that are always there: signs of NaN, their provenance, dead units."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ReferenceType

from torch import nn
from torch.optim import Optimizer

from torchprobe.buffer.step import Piece
from torchprobe.capture.eager_hooks import EagerHooks
from torchprobe.capture.flow import Flow
from torchprobe.capture.gate import Gate
from torchprobe.capture.notes import Notes
from torchprobe.capture.sentinel import Sentinel
from torchprobe.capture.sites import Pass
from torchprobe.capture.units import Units
from torchprobe.probes.base import Reporter
from torchprobe.records import Value


class Health:
    """The sentinel, and the watchers of module calls; `sentinel_gate` is None when no rule asks for the sentinel."""

    def __init__(
        self,
        model: ReferenceType[nn.Module],
        reporters: Iterable[Reporter],
        wanted: Callable[[str], bool],
        current: Pass,
        sentinel_gate: Gate | None,
    ) -> None:
        self.notes = Notes()
        self.watches = True
        """Whether the step that runs is one to watch module calls in."""
        self._sampled = True  # since the last collection
        reporters = list(reporters)
        self.flows = [Flow(reporter) for reporter in reporters if reporter.source == "flow"]
        self._units = [Units(reporter, wanted) for reporter in reporters if reporter.source == "units"]
        self._watchers: list[Flow | Units] = [*self.flows, *self._units]
        self._hooks = EagerHooks(model, self._watchers, current)
        self._sentinel = None if sentinel_gate is None else Sentinel(model, sentinel_gate)

    def open_for(self, step: int) -> None:
        """A step begins: one that deserves a close look gets it, whatever the schedule."""
        self._open_flows()
        self.watches = False
        for watcher in self._watchers:
            self.watches |= watcher.gate.train
        self._sampled |= self.watches
        if self.watches and any(flow.gate.train for flow in self.flows):
            self.notes.open(step)

    def _open_flows(self) -> None:
        if self._sentinel is not None and self._sentinel.looks():
            for flow in self.flows:
                flow.gate.train = not flow.gate.failed

    def arm(self, training: bool) -> None:
        """Put hooks on for the coming pass, or off."""
        self._hooks.arm(training)

    def enter(self) -> None:
        """A forward pass begins."""
        self._hooks.begin()

    def on_output(self, output: Any) -> None:
        """A training pass has returned."""
        if self._sentinel is not None:
            self._sentinel.on_output(output)

    def before_step(self, optimizer: Optimizer) -> None:
        """Gradients are final."""
        if self._sentinel is not None:
            self._sentinel.on_gradients(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        """Parameters are updated."""
        if self._sentinel is not None:
            self._sentinel.on_parameters(optimizer)

    def collect(self) -> list[Piece]:
        """What the passes of a step gave; starts anew."""
        if not self._sampled:
            return []
        self._sampled = self.watches  # what a skipped step leaves goes on
        for flow in self.flows:
            self.notes.saw(flow.shapes)
        flows = [piece for flow in self.flows for piece in flow.collect()]
        return flows + [piece for units in self._units for piece in units.collect()]

    def signs(self) -> tuple[dict[str, Value], list[Piece], bool]:
        """Signs of NaN in a step: known already, and to be read; whether the drain should look at once."""
        return ({}, [], False) if self._sentinel is None else self._sentinel.take()

    def detach(self) -> None:
        """Take everything off the model."""
        self._hooks.disarm()
