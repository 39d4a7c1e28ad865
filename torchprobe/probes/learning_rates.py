"""Learning rates of every parameter group, and momentum and weight decay when they change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from torchprobe.probes.base import Probe, Reporter

_ON_CHANGE = ("momentum", "weight_decay")


class LearningRates(Probe):
    """`lr/<Optimizer>/group_<i>`, at every step by default; of a second optimizer of one class `<Optimizer>_1`.

    Costs a dictionary look-up a group; a learning rate that is a device tensor is not read here. What is no number,
    such as `lr=None`, is left out.
    """

    source: ClassVar[str] = "optimizers"
    fields: ClassVar[tuple[str, ...]] = ("value",)
    reduce = "last"
    default_every: ClassVar[int] = 1
    sampled: ClassVar[bool] = False
    always: ClassVar[bool] = True
    descriptions: Mapping[str, str] = {
        "lr": "Learning rate that the optimizer used in this step.",
        "momentum": "Momentum (beta1 for Adam), written when it changes.",
        "weight_decay": "Weight decay, written when it changes.",
    }

    def reporter(self) -> LearningRatesReporter:
        """Tells optimizers of one class apart, and values that changed from those that did not."""
        return LearningRatesReporter(self)

    def observe(self, optimizer: Optimizer) -> Iterator[tuple[str, float | Tensor]]:
        """Tags and values of the step that this optimizer has just taken, under the name of its class.

        A subclass may add to these. The session numbers optimizers of one class, and leaves out momentum and weight
        decay that have not changed.
        """
        name = type(optimizer).__name__
        for i, group in enumerate(optimizer.param_groups):
            where, rate = f"{name}/group_{i}", group.get("lr")
            if isinstance(rate, Tensor) and rate.numel() == 1:
                yield f"lr/{where}", rate.detach().clone()  # a scheduler changes it in place
            elif isinstance(rate, Real):
                yield f"lr/{where}", float(rate)
            for key, value in (("momentum", _momentum(group)), ("weight_decay", group.get("weight_decay"))):
                if isinstance(value, Real):
                    yield f"{key}/{where}", float(value)


_KEYS = ("lr", "momentum", "betas", "weight_decay")


class _Unchanged:
    """What an optimizer used at its last step: most steps use the same again, which costs a comparison."""

    def __init__(self, optimizer: Optimizer, found: list[tuple[str, float | Tensor]]) -> None:
        self.rates = [(tag, value) for tag, value in found if tag.startswith("lr/")]
        self._values = _values(optimizer)
        self._comparable = not any(isinstance(value, Tensor) for value in self._values)

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether the next step used the same; a tensor is never compared, which would read it."""
        if not self._comparable or len(optimizer.param_groups) * len(_KEYS) != len(self._values):
            return False
        known = iter(self._values)
        for group in optimizer.param_groups:
            for key in _KEYS:
                value, before = group.get(key), next(known)
                if value is not before and (isinstance(value, Tensor) or value != before):
                    return False
        return True


def _values(optimizer: Optimizer) -> list[Any]:
    return [group.get(key) for group in optimizer.param_groups for key in _KEYS]


class LearningRatesReporter(Reporter):
    """What the optimizers of one session are called, and what they used last."""

    def __init__(self, probe: LearningRates) -> None:
        super().__init__(probe)
        self._observe = probe.observe
        self._labels: WeakKeyDictionary[Optimizer, str] = WeakKeyDictionary()
        self._last: WeakKeyDictionary[Optimizer, dict[str, Any]] = WeakKeyDictionary()
        self._plain = type(probe).observe is LearningRates.observe
        self._unchanged: WeakKeyDictionary[Optimizer, _Unchanged] = WeakKeyDictionary()

    def observe(self, optimizer: Optimizer) -> list[tuple[str, float | Tensor]]:
        """Tags and values of the step that this optimizer has just taken. Raises what a user's `observe` raises."""
        if self._plain:
            same = self._unchanged.get(optimizer)
            if same is not None and same.holds(optimizer):
                return same.rates
        found = self._observed(optimizer)
        if self._plain:
            self._unchanged[optimizer] = _Unchanged(optimizer, found)
        return found

    def _observed(self, optimizer: Optimizer) -> list[tuple[str, float | Tensor]]:
        name, label = type(optimizer).__name__, self._label(optimizer)
        last = self._last.setdefault(optimizer, {})
        found = []
        for tag, value in self._observe(optimizer):
            group, _, where = tag.partition("/")
            if group in _ON_CHANGE and isinstance(value, Real):
                if last.get(tag) == value:
                    continue
                last[tag] = value
            named = where.startswith(f"{name}/")
            found.append((f"{group}/{label}{where[len(name) :]}" if named else tag, value))
        return found

    def _label(self, optimizer: Optimizer) -> str:
        if optimizer not in self._labels:
            name, taken = type(optimizer).__name__, set(self._labels.values())
            numbered = (f"{name}_{i}" if i else name for i in itertools.count())
            self._labels[optimizer] = next(label for label in numbered if label not in taken)
        return self._labels[optimizer]


def _momentum(group: Mapping[str, Any]) -> Any:
    """Of a group with `betas` the first of these."""
    betas = group.get("betas")
    return betas[0] if isinstance(betas, tuple | list) and betas else group.get("momentum")
