"""Counts on how many inputs each unit behind a ReLU is active."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import in_backward
from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.source import Pass
from torchprobe.naming import Modules
from torchprobe.probes.base import Reporter
from torchprobe.statistics.moments import active_units, inactive_share

_KINDS = (nn.ReLU, nn.ReLU6, nn.Threshold)
_LEAST = 32  # inputs


class _Count(NamedTuple):
    """Of one call of a module in a pass: a shared module has as many as it is called."""

    active: Tensor
    inputs: int


Counts: TypeAlias = "dict[str, list[_Count]]"


class Units:
    """Counts of a pass; those of sampled steps add up while there are few inputs."""

    in_validation = False

    def __init__(self, reporter: Reporter, wanted: Callable[[str], bool]) -> None:
        self.reporter = reporter
        self._wanted = wanted
        self._few: Counts = {}

    def chosen(self, modules: Modules) -> Iterable[tuple[str, nn.Module]]:
        """Modules of the ReLU family that include= and exclude= leave."""
        found = [(n, m) for n, m in modules if isinstance(m, _KINDS) and self._wanted(n)]
        with self.reporter.gate.boundary():
            return [(name, module) for name, module in found if self.reporter.probe.selects(name, module)]
        return []  # the boundary took an exception

    def before(
        self, passing: Pass, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Nothing to see before it has run."""

    def after(self, passing: Pass, name: str, output: Any) -> None:
        """Counts the active elements of each unit."""
        tensor = main_tensor(output)
        if tensor is None or not tensor.numel() or in_backward():
            return
        active = active_units(tensor)
        counts: Counts = passing.kept.setdefault(self, {})
        counts.setdefault(name, []).append(_Count(active, tensor.numel() // active.numel()))

    def unseen(self, reason: str) -> None:
        """Said with what else saw nothing."""
        self.reporter.explain(reason)

    def merge(self, a: Counts, b: Counts) -> Counts:
        """Call by call: the first with the first, and so on."""
        for name, counts in b.items():
            a[name] = _added(a.get(name, []), counts)
        return a

    def rows(self, counts: Counts, training: bool, due: frozenset[Reporter]) -> list[Piece]:
        """A row for each module: a NaN while it has seen few inputs, else its share, and it starts anew."""
        if not training or self.reporter.gate.failed:
            return []
        self._few = self.merge(self._few, counts)
        return [Piece(self.reporter, [name], self._share(name).reshape(1, 1)) for name in sorted(counts)]

    def _share(self, name: str) -> Tensor:
        counts = self._few[name]
        if min(count.inputs for count in counts) < _LEAST:
            return torch.full((1,), torch.nan, device=counts[0].active.device)
        del self._few[name]
        return inactive_share([(count.active, count.inputs) for count in counts])


def _added(a: list[_Count], b: list[_Count]) -> list[_Count]:
    return [_both(*pair) for pair in zip_longest(a, b)]


def _both(a: _Count | None, b: _Count | None) -> _Count:
    if a is None or b is None or a.active.shape != b.active.shape or a.active.device != b.active.device:
        found = b if b is not None else a
        assert found is not None
        return found
    return _Count(a.active + b.active, a.inputs + b.inputs)
