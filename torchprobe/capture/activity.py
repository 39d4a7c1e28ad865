"""Which parts of modules are used: units behind a ReLU, and experts of mixture layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import in_backward
from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.source import Pass
from torchprobe.naming import ROOT, Modules
from torchprobe.probes.base import Reporter
from torchprobe.statistics import routing
from torchprobe.statistics.moments import active_units, inactive_share


class _OfModules:
    """What both have: a probe's own choice among the modules, and a reason where there is nothing to see."""

    def __init__(self, reporter: Reporter, wanted: Callable[[str], bool]) -> None:
        self.reporter = reporter
        self._wanted = wanted

    def unseen(self, reason: str) -> None:
        self.reporter.explain(reason)

    def _selected(self, found: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
        with self.reporter.gate.boundary():
            return [(name, module) for name, module in found if self.reporter.probe.selects(name, module)]
        return []  # the boundary took an exception


# ---- on how many inputs each unit behind a ReLU is active

_KINDS = (nn.ReLU, nn.ReLU6, nn.Threshold)
_LEAST = 32  # inputs


class _Count(NamedTuple):
    """Of one call of a module in a pass: a shared module has as many as it is called."""

    active: Tensor
    inputs: int


Counts: TypeAlias = "dict[str, list[_Count]]"


class Units(_OfModules):
    """Counts of a pass; those of sampled steps add up while there are few inputs."""

    in_validation = False

    def __init__(self, reporter: Reporter, wanted: Callable[[str], bool]) -> None:
        super().__init__(reporter, wanted)
        self._few: Counts = {}

    def chosen(self, modules: Modules) -> Iterable[tuple[str, nn.Module]]:
        """Modules of the ReLU family that include= and exclude= leave."""
        return self._selected([(n, m) for n, m in modules if isinstance(m, _KINDS) and self._wanted(n)])

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

    def merge(self, a: Counts, b: Counts) -> Counts:
        """Call by call: the first with the first, and so on."""
        for name, counts in b.items():
            a[name] = [_both(*pair) for pair in zip_longest(a.get(name, []), counts)]
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


def _both(a: _Count | None, b: _Count | None) -> _Count:
    if a is None or b is None or a.active.shape != b.active.shape or a.active.device != b.active.device:
        found = b if b is not None else a
        assert found is not None
        return found
    return _Count(a.active + b.active, a.inputs + b.inputs)


# ---- how mixture layers route their tokens: a module whose output holds logits, weights and choices of experts, and
# beside it the experts that are called with these choices

Kept: TypeAlias = "dict[str, Tensor]"


class _Routed(NamedTuple):
    """What a router has just put out. places: where its choices lie, by which the experts' arguments are known."""

    name: str
    rows: Tensor
    places: frozenset[int]


class Routers(_OfModules):
    """Of each router in a pass, a row for every expert. Holds no tensor of the user's."""

    in_validation = True

    def __init__(self, reporter: Reporter, wanted: Callable[[str], bool]) -> None:
        super().__init__(reporter, wanted)
        self._experts: dict[str, int] = {}  # of each module that holds some
        self._routed: dict[str, _Routed] = {}  # by the layer
        self._open: set[str] = set()  # layers that run, whose routing is yet to be seen

    def chosen(self, modules: Modules) -> Iterable[tuple[str, nn.Module]]:
        """Layers with experts, and their parts, as far as include=, exclude= and select= leave these."""
        found: dict[str, nn.Module] = {}
        self._experts = {}
        for name, layer in [(name, layer) for name, layer in modules if layer._modules]:
            parts = {_joined(name, child): part for child, part in layer.named_children()}
            experts = {part: count for part, count in _experts(parts) if self._wanted(name)}
            if experts:
                self._experts |= experts
                found |= {name: layer, **parts}
        return self._selected(found.items())

    def before(
        self, passing: Pass, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Experts are called: with the choices of the router beside them?"""
        if in_backward():
            return
        if name not in self._experts:
            self._open.add(name)
            return
        layer = name.rpartition(".")[0] or ROOT
        routed = self._routed.pop(layer, None)
        places = {t.data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        if routed is not None and len(routed.rows) == self._experts[name] and routed.places <= places:
            self._open.discard(layer)
            kept: Kept = passing.kept.setdefault(self, {})
            self.merge(kept, {routed.name: routed.rows})

    def after(self, passing: Pass, name: str, output: Any) -> None:
        """A router, or the layer, has run."""
        if in_backward():
            return
        layer = name.rpartition(".")[0] or ROOT
        if name in self._open and any(part.rpartition(".")[0] == name.removeprefix(ROOT) for part in self._experts):
            self.reporter.remark(f"router_load of {name} is not recorded: how its tokens get to experts was not seen")
        self._open.discard(name)
        found = _routed(output)
        if found is not None:
            rows, places = found
            self._routed[layer] = _Routed(name, rows, places)

    def merge(self, a: Kept, b: Kept) -> Kept:
        """Tokens add up."""
        for name, rows in b.items():
            a[name] = a[name] + rows.to(a[name].device) if name in a else rows
        return a

    def rows(self, kept: Kept, training: bool, due: frozenset[Reporter]) -> list[Piece]:
        """A row for each expert, all under the router's name."""
        if self.reporter.gate.failed:
            return []
        prefix = "" if training else "val/"
        return [Piece(self.reporter, [name] * len(rows), rows, prefix) for name, rows in kept.items()]


def _joined(name: str, child: str) -> str:
    return child if name == ROOT else f"{name}.{child}"


def _experts(parts: dict[str, nn.Module]) -> Iterator[tuple[str, int]]:
    """Those that look like experts, beside another part that may be their router; and how many they are."""
    for name, part in parts.items() if len(parts) > 1 else ():
        if "expert" in (name.rpartition(".")[2] + type(part).__name__).lower():
            given = [p for p in part._parameters.values() if p is not None and not is_lazy(p)]
            stacked = {p.shape[0] for p in given if p.dim() == 3}
            listed = len(part) if isinstance(part, nn.ModuleList | nn.ModuleDict) else 0
            count = listed or (stacked.pop() if len(stacked) == 1 else 0)
            if count > 1:
                yield name, count


def _routed(output: Any) -> tuple[Tensor, frozenset[int]] | None:
    """The rows of what may be a router's output: logits, weights and choices, in any order."""
    if not isinstance(output, tuple | list) or not all(isinstance(part, Tensor) for part in output):
        return None
    choices = [part for part in output if not (part.is_floating_point() or part.is_complex()) and part.dim() > 1]
    floating = [part for part in output if part.is_floating_point() and part.dim() > 1]
    if len(choices) != 1 or len(floating) != 2 or len(output) != 3:
        return None
    floating.sort(key=lambda part: part.shape[-1])
    weights, logits = (part.detach().flatten(0, -2) for part in floating)
    chosen = choices[0].detach().flatten(0, -2)
    if not len(logits) == len(weights) == len(chosen) or not len(logits):
        return None
    places = frozenset((choices[0].data_ptr(), floating[0].data_ptr()))
    if chosen.shape == weights.shape:
        return routing.of_choices(logits, weights, chosen), places
    return (routing.of_mask(logits, weights, chosen), places) if chosen.shape == logits.shape else None
