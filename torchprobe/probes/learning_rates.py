"""Learning rates of every parameter group, and momentum and weight decay when they change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from torchprobe.schedule import Schedule, as_schedule

_ON_CHANGE = ("momentum", "weight_decay")


class LearningRates:
    """`lr/<Optimizer>/group_<i>`, at every step by default.

    Costs a dictionary look-up a group; a learning rate that is a device tensor is not read here.
    """

    descriptions: Mapping[str, str] = {
        "lr": "Learning rate that the optimizer used in this step.",
        "momentum": "Momentum (beta1 for Adam), written when it changes.",
        "weight_decay": "Weight decay, written when it changes.",
    }

    def __init__(self, every: int | Schedule | None = None) -> None:
        self.schedule = as_schedule("every", 1 if every is None else every)
        self._labels: WeakKeyDictionary[Optimizer, str] = WeakKeyDictionary()
        self._last: WeakKeyDictionary[Optimizer, dict[str, Any]] = WeakKeyDictionary()

    @property
    def name(self) -> str:
        """How messages and summaries call the probe."""
        return type(self).__name__

    def observe(self, optimizer: Optimizer) -> Iterator[tuple[str, float | Tensor]]:
        """Tags and values of the step that this optimizer has just taken."""
        label = self._label(optimizer)
        for i, group in enumerate(optimizer.param_groups):
            rate = group["lr"]  # a tensor is copied: a scheduler changes it in place
            yield f"lr/{label}/group_{i}", rate.detach().clone() if isinstance(rate, Tensor) else rate
            yield from self._changed(optimizer, group, f"{label}/group_{i}")

    def _changed(self, optimizer: Optimizer, group: dict[str, Any], where: str) -> Iterator[tuple[str, float]]:
        last = self._last.setdefault(optimizer, {})
        for key in _ON_CHANGE:
            value = group.get(key)
            if key == "momentum" and "betas" in group:
                value = group["betas"][0]
            if isinstance(value, int | float) and last.get(f"{key}/{where}") != value:
                last[f"{key}/{where}"] = value
                yield f"{key}/{where}", value

    def _label(self, optimizer: Optimizer) -> str:
        if optimizer not in self._labels:
            name, taken = type(optimizer).__name__, set(self._labels.values())
            numbered = (f"{name}_{i}" if i else name for i in itertools.count())
            self._labels[optimizer] = next(label for label in numbered if label not in taken)
        return self._labels[optimizer]
