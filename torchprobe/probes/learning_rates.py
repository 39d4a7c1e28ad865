"""Learning rates of every parameter group, and momentum and weight decay when they change."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from operator import is_, itemgetter
from typing import Any, ClassVar, TypeAlias
from weakref import ref

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from torchprobe.probes.base import Probe, Reporter
from torchprobe.records import number_of

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
            if isinstance(rate, Tensor):
                if rate.numel() == 1:
                    yield f"lr/{where}", rate.detach().clone()  # a scheduler changes it in place
            elif isinstance(rate, Real | np.ndarray) and (number := number_of(rate)) is not None:
                yield f"lr/{where}", number
            for key, value in (("momentum", _momentum(group)), ("weight_decay", group.get("weight_decay"))):
                if isinstance(value, Real):
                    yield f"{key}/{where}", float(value)


_KEYS = ("lr", "momentum", "betas", "weight_decay")


class _Used:
    """What an optimizer is called, and what it used last: most steps use the same again, which costs a comparison.

    values: of each group its size, what fetches them, and them; None while a tensor is among them.
    """

    def __init__(self, label: str, optimizer: Optimizer) -> None:
        self.label = label
        self.of = ref(optimizer)
        self.rates: list[Tagged] = []
        self._last: dict[str, Any] = {}
        self.values: list[tuple[int, Callable[[Any], Any], tuple[Any, ...]]] | None = None

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
        groups = [(group, _fetcher(tuple([key for key in _KEYS if key in group]))) for group in optimizer.param_groups]
        self.values = [(len(group), fetch, fetch(group)) for group, fetch in groups]
        if any(isinstance(value, Tensor | np.ndarray) for _, _, values in self.values for value in values):
            self.values = None
        return found


@functools.cache
def _fetcher(keys: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    return itemgetter(*keys, keys[0]) if keys else lambda group: ()  # a tuple also of one


class LearningRatesReporter(Reporter):
    """What the optimizers of one session are called, and what they used last."""

    def __init__(self, probe: LearningRates) -> None:
        super().__init__(probe)
        self._observe = probe.observe
        self._plain = type(probe).observe is LearningRates.observe
        self._used: dict[int, _Used] = {}  # by identity, which a later one may have again

    def observe(self, optimizer: Optimizer) -> list[Tagged]:
        """Tags and values of the step that this optimizer has just taken. Raises what a user's `observe` raises."""
        used, groups = self._used.get(id(optimizer)), optimizer.param_groups
        if used is None or used.of() is not optimizer:
            used = self._meet(optimizer)
        if not self._plain or used.values is None or len(used.values) != len(groups):
            return used.note(optimizer, self._observe(optimizer))
        for group, (size, fetch, values) in zip(groups, used.values, strict=True):
            if len(group) != size or not all(map(is_, fetch(group), values)):
                return used.note(optimizer, self._observe(optimizer))
        return used.rates

    def _meet(self, optimizer: Optimizer) -> _Used:
        self._used = {key: used for key, used in self._used.items() if used.of() is not None}
        name, taken = type(optimizer).__name__, {other.label for other in self._used.values()}
        numbered = (f"{name}_{i}" if i else name for i in itertools.count())
        used = self._used[id(optimizer)] = _Used(next(label for label in numbered if label not in taken), optimizer)
        return used


def _momentum(group: Mapping[str, Any]) -> Any:
    """Of a group with `betas` the first of these."""
    betas = group.get("betas")
    return betas[0] if isinstance(betas, tuple | list) and betas else group.get("momentum")
