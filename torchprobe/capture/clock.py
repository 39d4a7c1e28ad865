"""Counts steps. Knows what an optimizer step is, and nothing of hooks or tensors."""

from __future__ import annotations

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
        self.skipped = 0
        self.manual = False
        self._known: WeakSet[Optimizer] = WeakSet()
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._absent: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._first_round = True

    @property
    def has_optimizer(self) -> bool:
        """Whether an optimizer has stepped: from then on forward passes are no clock."""
        return bool(self._known)

    def joins_last_step(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's first step belongs to the step that has just been counted."""
        return self._first_round and bool(self._known) and optimizer not in self._known

    def begin(self, optimizer: Optimizer) -> bool:
        """An optimizer is about to step. True when that ended the step before: it steps twice."""
        if optimizer in self._known:
            self._first_round = False
        if self.manual or optimizer not in self._stepped:
            return False
        self._finish()
        return True

    def end(self, optimizer: Optimizer) -> bool:
        """An optimizer has stepped. True when that completed the run's step."""
        if self.joins_last_step(optimizer):
            self._known.add(optimizer)
            return False
        if not self._known and not self.manual:
            self.completed = 0  # forward passes before training (a sanity check) are no steps of it
        self._known.add(optimizer)
        self._stepped.add(optimizer)
        if self.manual or any(known not in self._stepped for known in self._known):
            return False
        self._finish()
        return True

    def tick(self) -> None:
        """A step ends by a forward pass (pure inference) or by hand."""
        self._finish()

    def _finish(self) -> None:
        for optimizer in list(self._known):
            absent = 0 if optimizer in self._stepped else self._absent.get(optimizer, 0) + 1
            self._absent[optimizer] = absent
            if absent >= _FORGOTTEN_AFTER:
                self._known.discard(optimizer)
        self._stepped.clear()
        self.completed += 1
