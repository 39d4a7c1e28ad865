"""Counts on how many inputs each unit behind a ReLU is active."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.gate import Gate
from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.recompute import in_backward
from torchprobe.naming import named_modules
from torchprobe.probes.base import Reporter
from torchprobe.statistics.activity import active_units, inactive_share

_KINDS = (nn.ReLU, nn.ReLU6, nn.Threshold)
_LEAST = 32  # inputs


class _Count:
    """Of one call of a module in a pass: a shared module has as many as it is called."""

    def __init__(self, active: Tensor, inputs: int) -> None:
        self.active = active
        self.inputs = inputs


class Units:
    """Adds up over micro-batches, and over sampled steps while there are few inputs."""

    def __init__(self, reporter: Reporter, wanted: Callable[[str], bool]) -> None:
        self.gate: Gate = reporter.gate
        self._reporter = reporter
        self._wanted = wanted
        self._counts: dict[str, list[_Count]] = {}
        self._calls: dict[str, int] = {}  # of the running pass
        self._called: set[str] = set()  # in the running step

    def chosen(self, model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        """Modules of the ReLU family that include= and exclude= leave."""
        found = [(n, m) for n, m in named_modules(model) if isinstance(m, _KINDS) and self._wanted(n)]
        with self.gate.boundary():
            return [(name, module) for name, module in found if self._reporter.probe.selects(name, module)]
        return []  # the boundary took an exception

    def begin(self) -> None:
        """A pass of the model begins."""
        self._calls.clear()

    def before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing to see before it has run."""

    def after(self, name: str, output: Any) -> None:
        """Counts the active elements of each unit."""
        tensor = main_tensor(output)
        if tensor is None or not tensor.numel() or in_backward():
            return
        active = active_units(tensor)
        self._called.add(name)
        call = self._calls[name] = self._calls.get(name, -1) + 1
        counts = self._counts.setdefault(name, [])
        new = _Count(active, tensor.numel() // active.numel())
        if call >= len(counts):
            counts.append(new)
        elif counts[call].active.shape == active.shape and counts[call].active.device == active.device:
            counts[call].active += active
            counts[call].inputs += new.inputs
        else:
            counts[call] = new

    def unseen(self, reason: str) -> None:
        """Said with what else saw nothing."""
        self._reporter.explain(reason)

    def collect(self) -> list[Piece]:
        """A row for each module of the step: a NaN while it has seen few inputs, else its share, and it starts anew."""
        called, self._called = self._called, set()
        return [Piece(self._reporter, [name], self._share(name).reshape(1, 1)) for name in sorted(called)]

    def _share(self, name: str) -> Tensor:
        counts = self._counts[name]
        if min(count.inputs for count in counts) < _LEAST:
            return torch.full((1,), torch.nan, device=counts[0].active.device)
        del self._counts[name]
        return inactive_share([(count.active, count.inputs) for count in counts])
