"""The number of the step that is open, and what begins the next one. Knows nothing of hooks or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType, ref

from torch.optim import Optimizer


class StepMachine:
    """Counts steps: a new one begins with the first training pass after an optimizer of the model has stepped.

    One step is open at any time: step 0 before the first training pass, and step k from its first training pass until
    that of step k + 1. Methods that may begin a step answer whether they did.
    """

    def __init__(self) -> None:
        self.number = 0  # of the open step
        self.completed = 0
        self.origin = 0  # where this process began to count: not at 0 in a resumed run
        self.skipped = 0
        self.manual = False  # the user ends steps
        self.by_forward = False  # no optimizer is in sight: forward passes do
        self.optimizer_seen = False
        self.passes_seen = False  # a training pass ran in the open step
        self.stepped = True  # an optimizer has stepped in the open step, or it is step 0
        self._by: list[ReferenceType[Optimizer]] = []  # those that have, in the open step
        self._by_before: list[ReferenceType[Optimizer]] = []  # in the step before it

    @property
    def fresh(self) -> bool:
        """Whether this process has completed no step yet."""
        return self.completed == self.origin

    @property
    def untouched(self) -> bool:
        """Whether nothing has happened in this process yet that a resumed state would undo."""
        return self.fresh and self.number == self.origin and not self.optimizer_seen

    @property
    def ended(self) -> bool:
        """Whether a training pass would begin a step."""
        return self.stepped and not (self.manual and self.number)

    @property
    def following(self) -> int:
        """The number of the step that a training pass belongs to."""
        return self.number + 1 if self.ended else self.number

    @property
    def stepped_by(self) -> list[Optimizer]:
        """The optimizers that have stepped in the open step."""
        return [optimizer for one in self._by if (optimizer := one()) is not None]

    def shares_passes(self, optimizer: Optimizer) -> bool:
        """Whether the open step has no passes, and this optimizer none of its own since those of the step before it."""
        return not self.passes_seen and all(one() is not optimizer for one in self._by_before)

    def training_pass(self) -> bool:
        """A training pass begins."""
        begins = self.stepped and not (self.manual and self.number)
        if begins:  # as `_begin`, without its call
            self.number += 1
            self.stepped = False
            self._by_before, self._by = self._by, []
        self.passes_seen = True
        return begins

    def begin(self, optimizer: Optimizer, has_closure: bool) -> bool:
        """An optimizer is about to step, with passes of its own when it has a closure."""
        if not self.stepped:
            return False
        # No training pass came since a step ended: then several optimizers share the step.
        again = any([one() is optimizer for one in self._by])  # noqa: C419
        begins = self.ended and (has_closure or self.number == 0 or self.fresh or again)
        if begins:
            self._begin()
        return begins

    def end(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        self._by.append(ref(optimizer))
        self.optimizer_seen = True
        if not self.manual:
            self.completed, self.stepped = self.number, True

    def end_by_forward(self) -> None:
        """A forward pass has ended that is a step by itself."""
        self.completed, self.stepped = self.number, True

    def next_step(self) -> None:
        """The user ends the step. The first call right after an optimizer's step finds it ended already."""
        first, self.manual = not self.manual, True
        self.by_forward = False
        if not (first and self.stepped and self.number):
            self.number = max(self.number, 1)
            self.completed = self.number
        self._begin()

    def count_passes(self, by_forward: bool) -> None:
        """Whether forward passes are the clock, for want of an optimizer."""
        self.by_forward = by_forward

    def skip(self) -> None:
        """An iteration ended without a step."""
        self.skipped += 1

    def forget_passes(self) -> None:
        """Passes that were counted for want of an optimizer came before training: they were no steps."""
        self.by_forward = False
        self.number = self.completed = 0
        self.stepped = True

    def state_dict(self) -> dict[str, Any]:
        """Where the machine stands, and what makes it go on."""
        return {
            "completed": self.completed,
            "skipped": self.skipped,
            "manual": self.manual,
            "has_optimizer": self.optimizer_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the next training pass begins a step, which is open already where the user ends steps."""
        self.skipped = int(state["skipped"])
        self.number = self.completed = self.origin = _counted(state["completed"])
        self.manual = bool(state["manual"])
        self.optimizer_seen = bool(state["has_optimizer"])
        self.stepped = True
        if self.manual:
            self._begin()

    def _begin(self) -> None:
        self.number += 1
        self.passes_seen = self.stepped = False
        self._by_before, self._by = self._by, []


def _counted(steps: Any) -> int:
    """Raises ValueError for what no run has done and no event file can hold."""
    if not 0 <= (number := int(steps)) < 2**62:
        raise ValueError(f"{number} completed steps")
    return number
