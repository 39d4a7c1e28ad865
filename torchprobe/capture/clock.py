"""Counts steps. Knows what an optimizer step is, and nothing of hooks or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch.optim import Optimizer

_FORGOTTEN_AFTER = 8  # steps without a sign of an optimizer that is still alive


class Clock:
    """Turns steps of one or several optimizers into steps of the run.

    A step ends when each optimizer that has stepped before has stepped again, or when one steps
    twice. An optimizer that shows up for the first time while the others have made one step only
    belongs to that step: two optimizers used in turn are one step from the first iteration on.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.origin = 0  # where this process began to count: not at 0 in a resumed run
        self.skipped = 0
        self.manual = False
        self.has_optimizer = False  # one has stepped: from then on forward passes are no clock
        self._known: WeakSet[Optimizer] = WeakSet()
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._absent: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._first_round = True

    @property
    def fresh(self) -> bool:
        """Whether this process has completed no step yet."""
        return self.completed == self.origin

    @property
    def by_forward(self) -> bool:
        """Whether forward passes are the clock."""
        return not (self.has_optimizer or self.manual)

    @property
    def underway(self) -> bool:
        """Whether an optimizer has stepped in a step that others have yet to complete."""
        return bool(self._stepped) and not self.manual

    @property
    def may_grow(self) -> bool:
        """Whether a new optimizer would belong to the step that has just been counted."""
        return self._first_round and bool(self._known) and not self.manual

    def joins_last_step(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's first step belongs to the step that has just been counted."""
        return self._first_round and self.may_grow and optimizer not in self._known

    def begin(self, optimizer: Optimizer, new_pass: bool = False) -> bool:
        """An optimizer is about to step. True when that ended the step before: it steps twice.

        new_pass: a training pass began since the last step that was counted.
        """
        if optimizer in self._known:
            self._first_round = False
        elif new_pass:
            self._take_over(optimizer)
        if self.manual or optimizer not in self._stepped:
            return False
        self.tick()
        return True

    def end(self, optimizer: Optimizer) -> bool:
        """An optimizer has stepped. True when that completed the run's step."""
        joins = self.joins_last_step(optimizer)
        self.has_optimizer = True
        self._known.add(optimizer)
        if joins:
            return True
        self._stepped.add(optimizer)
        if self.manual or not self._known <= self._stepped:
            return False
        self.tick()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Where the clock stands, and what makes it tick."""
        return {
            "completed": self.completed,
            "skipped": self.skipped,
            "manual": self.manual,
            "has_optimizer": self.has_optimizer,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.completed = self.origin = int(state["completed"])
        self.skipped = int(state["skipped"])
        self.manual = bool(state["manual"])
        self.has_optimizer = bool(state["has_optimizer"])

    def _take_over(self, optimizer: Optimizer) -> None:
        """Forget those over the same parameters: a new optimizer takes their place, though the old one may live on."""
        held = _parameter_ids(optimizer)
        for known in list(self._known):
            if not held.isdisjoint(_parameter_ids(known)):
                self._known.discard(known)

    def tick(self) -> None:
        """A step is complete; by itself, when a forward pass (pure inference) or the user ends it."""
        for optimizer in list(self._known):
            absent = 0 if optimizer in self._stepped else self._absent.get(optimizer, 0) + 1
            self._absent[optimizer] = absent
            if absent >= _FORGOTTEN_AFTER:
                self._known.discard(optimizer)
        self._stepped.clear()
        self.completed += 1


def _parameter_ids(optimizer: Optimizer) -> set[int]:
    """Identities of the parameters that an optimizer holds."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
