"""Steps that the caller ends, without a model to watch."""

from __future__ import annotations

from torchprobe.buffer.outlet import Outlet
from torchprobe.capture.gate import Meter
from torchprobe.steps.machine import StepMachine
from torchprobe.steps.open_step import OpenStep
from torchprobe.steps.protection import Guard, protected

VALIDATION = "val"


class ManualSteps:
    """The step that is open: the one that ended last, until something of the running one is logged.

    So validation between two steps belongs to the first of them, and what comes before everything else to step 0.
    """

    def __init__(self, outlet: Outlet) -> None:
        self.guard = Guard(Meter(), outlet.stopped)
        self.clock = StepMachine()
        self.clock.training_pass()  # step 1 runs from the beginning
        self.current = OpenStep(0)
        self._outlet = outlet

    @protected
    def open(self, prefix: str = "") -> OpenStep:
        """The step that what has this prefix belongs to; None once nothing is recorded any more, or in a fork."""
        if self.current.number != self.clock.number and prefix.split("/", 1)[0] != VALIDATION:
            self.write()
            self.current = OpenStep(self.clock.number)
        return self.current

    def next_step(self) -> None:
        """The running step ends; one of which nothing was logged is a step, too."""
        self.open()
        self.clock.next_step()

    @protected
    def write(self) -> None:
        """Hand over what the open step has so far."""
        self._outlet.hand_over(self.current.number, self.current.take())
