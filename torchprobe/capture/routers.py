"""Finds how mixture layers route their tokens: a module whose output holds logits, weights and choices of experts, and
beside it the experts that are called with these choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import in_backward
from torchprobe.capture.source import Pass
from torchprobe.naming import ROOT, Modules
from torchprobe.probes.base import Reporter
from torchprobe.statistics import routing

Kept: TypeAlias = "dict[str, Tensor]"


class _Routed(NamedTuple):
    """What a router has just put out. places: where its choices lie, by which the experts' arguments are known."""

    name: str
    rows: Tensor
    places: frozenset[int]


class Routers:
    """Of each router in a pass, a row for every expert. Holds no tensor of the user's."""

    in_validation = True

    def __init__(self, reporter: Reporter, wanted: Callable[[str], bool]) -> None:
        self.reporter = reporter
        self._wanted = wanted
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
        with self.reporter.gate.boundary():
            return [(name, module) for name, module in found.items() if self.reporter.probe.selects(name, module)]
        return []  # the boundary took an exception

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

    def unseen(self, reason: str) -> None:
        """Said with what else saw nothing."""
        self.reporter.explain(reason)

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
    floating = sorted((part for part in output if part.is_floating_point() and part.dim() > 1), key=_last)
    if len(choices) != 1 or len(floating) != 2 or len(output) != 3:
        return None
    weights, logits = (part.detach().flatten(0, -2) for part in floating)
    chosen = choices[0].detach().flatten(0, -2)
    if not len(logits) == len(weights) == len(chosen) or not len(logits):
        return None
    places = frozenset((choices[0].data_ptr(), floating[0].data_ptr()))
    if chosen.shape == weights.shape:
        return routing.of_choices(logits, weights, chosen), places
    return (routing.of_mask(logits, weights, chosen), places) if chosen.shape == logits.shape else None


def _last(tensor: Tensor) -> int:
    return tensor.shape[-1]
