"""What flows into and out of every module, forward and backward, as extremes in execution order."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import in_backward
from torchprobe.capture.gate import Gate, no_autocast
from torchprobe.capture.outputs import is_numeric, main_tensor, tensors_in
from torchprobe.naming import ROOT, named_modules
from torchprobe.probes.provenance import Provenance
from torchprobe.statistics.dtypes import real, row_dtype

_MOST_EVENTS = 20_000  # in a step


class Flow:
    """Keeps a row of extremes for each tensor that a module call sees, up to `_MOST_EVENTS` a step.

    One reduction a tensor, NaN and inf included: its extremes are NaN or inf then.
    """

    def __init__(self, probe: Provenance, gate: Gate) -> None:
        self.gate = gate
        self._probe = probe
        self._rows: defaultdict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
        self._turn = self._tensor = self._call = self._place = 0
        self._calls: list[int] = []  # those that are running
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of the tensors that the model was last called with, by position or keyword."""

    def chosen(self, model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        """Every module."""
        return named_modules(model)

    def begin(self) -> None:
        """A pass that raised may have left calls behind."""
        self._calls = []

    def before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Its parameters and inputs."""
        self._call += 1
        self._calls.append(self._call)
        given = list(_floats((args, kwargs)))
        if not in_backward():
            if name == ROOT:
                self.shapes = dict(_shapes(args, kwargs))
            prefix = "" if name == ROOT else f"{name}."
            for own, parameter in module.named_parameters(recurse=False):
                self._add(self._call, "parameter", prefix + own, parameter)
            for tensor in given:
                self._add(self._call, "in", name, tensor)
        for tensor in given:
            self._follow(self._call, "grad_in", name, tensor)

    def after(self, name: str, output: Any) -> None:
        """Its output."""
        call = self._calls.pop() if self._calls else 0
        tensor = main_tensor(output)
        if tensor is not None and call:
            if not in_backward():
                self._add(call, "out", name, tensor)
            self._follow(call, "grad_out", name, tensor)

    def unseen(self, reason: str) -> None:
        """The sentinel's own finding is all there is."""

    def collect(self) -> list[Piece]:
        """The events of a step; starts anew."""
        rows, self._rows = self._rows, defaultdict(list)
        self.shapes = {}
        self._turn = self._tensor = self._call = self._place = 0
        pieces = []
        for device, named in rows.items():
            stacked = torch.stack([row.to(row_dtype(device)) for _, row in named])
            pieces.append(Piece(self._probe, [name for name, _ in named], stacked))
        return pieces

    def _follow(self, call: int, kind: str, name: str, tensor: Tensor) -> None:
        if tensor.requires_grad and tensor.grad_fn is not None:  # a leaf would keep the hook
            tensor.register_hook(functools.partial(self._on_gradient, call, kind, name))

    def _on_gradient(self, call: int, kind: str, name: str, gradient: Tensor) -> None:
        if self.gate.train:
            with self.gate.boundary(), torch._C.DisableTorchFunction(), torch.no_grad():
                self._add(call, kind, name, gradient)

    def _add(self, call: int, kind: str, name: str, tensor: Tensor) -> None:
        if not _is_readable(tensor):
            return
        self._turn += 1
        if tensor.data_ptr() != self._place:  # all hooks of one gradient see it in turn
            self._place = tensor.data_ptr()
            self._tensor += 1
        if self._turn <= _MOST_EVENTS:
            with no_autocast(tensor.device):
                row = torch.stack(real(tensor).aminmax())
            self._rows[tensor.device].append((f"{self._turn} {self._tensor} {call} {kind} {name}", row))


def _is_readable(tensor: Tensor) -> bool:
    """Whether a reduction is one operation on elements that are here: no DTensor, sparse, nested or fake tensor."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.numel() > 0


def _floats(given: Any) -> Iterator[Tensor]:
    return (tensor for part in given for tensor in tensors_in(part) if is_numeric(tensor))


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, value in [*((str(i), value) for i, value in enumerate(args)), *kwargs.items()]:
        for i, tensor in enumerate(tensors_in(value)):
            yield (name if i == 0 else f"{name}.{i}"), tuple(tensor.shape)
