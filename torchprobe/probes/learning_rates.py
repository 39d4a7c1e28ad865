"""Learning rates of every parameter group, and momentum and weight decay when they change."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, ClassVar, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from torchprobe.probes.base import Probe, Reporter

Tagged: TypeAlias = "tuple[str, float | Tensor]"

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

    def observe(self, optimizer: Optimizer) -> Iterator[Tagged]:
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


class _Used:
    """What an optimizer is called, and what it used last: most steps use the same again, which costs a comparison."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.rates: list[Tagged] = []
        self._last: dict[str, Any] = {}
        self._values: list[Any] | None = None

    def again(self, optimizer: Optimizer) -> bool:
        """Whether the next step used the same; a tensor is never compared, which would read it."""
        if self._values is None or len(optimizer.param_groups) * len(_KEYS) != len(self._values):
            return False
        known = iter(self._values)
        for group in optimizer.param_groups:
            for key in _KEYS:
                value, before = group.get(key), next(known)
                if value is not before and (isinstance(value, Tensor) or value != before):
                    return False
        return True

    def note(self, optimizer: Optimizer, seen: Iterable[Tagged]) -> list[Tagged]:
        """What of these tags is to be written, under the optimizer's own name."""
        name, found = type(optimizer).__name__, []
        for tag, value in seen:
            group, _, where = tag.partition("/")
            if group in _ON_CHANGE and isinstance(value, Real):
                if self._last.get(tag) == value:
                    continue
                self._last[tag] = value
            named = where.startswith(f"{name}/")
            found.append((f"{group}/{self.label}{where[len(name) :]}" if named else tag, value))
        self.rates = [(tag, value) for tag, value in found if tag.startswith("lr/")]
        values = _values(optimizer)
        self._values = None if any(isinstance(value, Tensor) for value in values) else values
        return found


def _values(optimizer: Optimizer) -> list[Any]:
    return [group.get(key) for group in optimizer.param_groups for key in _KEYS]


class LearningRatesReporter(Reporter):
    """What the optimizers of one session are called, and what they used last."""

    def __init__(self, probe: LearningRates) -> None:
        super().__init__(probe)
        self._observe = probe.observe
        self._plain = type(probe).observe is LearningRates.observe
        self._used: WeakKeyDictionary[Optimizer, _Used] = WeakKeyDictionary()

    def observe(self, optimizer: Optimizer) -> list[Tagged]:
        """Tags and values of the step that this optimizer has just taken. Raises what a user's `observe` raises."""
        used = self._used.get(optimizer)
        if used is None:
            name, taken = type(optimizer).__name__, {other.label for other in self._used.values()}
            numbered = (f"{name}_{i}" if i else name for i in itertools.count())
            used = self._used[optimizer] = _Used(next(label for label in numbered if label not in taken))
        if self._plain and used.again(optimizer):
            return used.rates
        return used.note(optimizer, self._observe(optimizer))


def _momentum(group: Mapping[str, Any]) -> Any:
    """Of a group with `betas` the first of these."""
    betas = group.get("betas")
    return betas[0] if isinstance(betas, tuple | list) and betas else group.get("momentum")
