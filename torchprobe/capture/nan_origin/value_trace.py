"""What flows into and out of every module, forward and backward, as extremes in execution order."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import in_backward
from torchprobe.capture.compiled.operators import joinable, listen
from torchprobe.capture.outputs import given_tensors, is_numeric, main_tensor, tensors_in
from torchprobe.capture.source import Pass
from torchprobe.naming import ROOT, Modules
from torchprobe.probes.base import Reporter
from torchprobe.random_state import random_state
from torchprobe.records import StepSnapshot
from torchprobe.statistics import dtypes
from torchprobe.statistics.dtypes import real, row_dtype

_MOST_EVENTS = 20_000  # in a pass

Ends: TypeAlias = tuple[Tensor, Tensor]
"""The smallest and the largest element, 0-dim: NaN where there is one."""

_Seen: TypeAlias = tuple[int, str, str]
"""A call of a module, as what it saw a tensor, and the module's or parameter's name."""


class Trace:
    """The events of one pass: extremes for each tensor that a module call saw."""

    def __init__(self) -> None:
        self.rows: defaultdict[tuple[torch.device, torch.dtype], list[tuple[str, Ends]]] = defaultdict(list)
        self.calls: list[int] = []  # those that are running
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.events = 0

    def room(self, events: int) -> int:
        """So many more events come: how many there was room for before them."""
        self.events += events
        return _MOST_EVENTS - self.events + events

    def merge(self, other: Trace) -> None:
        """The events of one more pass, if there is room for them, and its shapes."""
        if self.events + other.events <= _MOST_EVENTS:
            for kind, rows in other.rows.items():
                self.rows[kind] += rows
            self.events += other.events
        self.shapes = other.shapes or self.shapes


class ValueTrace:
    """What every module call sees, one reduction a tensor: its extremes are NaN or inf where it holds some."""

    in_validation = False

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self._turn = self._tensor = self._call = self._place = 0  # they only grow, so that passes keep their order
        self._last: tuple[ReferenceType[Tensor], int, Ends] | None = None

    def chosen(self, modules: Modules) -> Iterable[tuple[str, nn.Module]]:
        """Every module."""
        return modules

    def before(
        self, passing: Pass, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Its inputs and parameters."""
        trace = passing.kept.get(self) or passing.kept.setdefault(self, Trace())
        self._call += 1
        trace.calls.append(self._call)
        given = [tensor for tensor in given_tensors(args, kwargs) if is_numeric(tensor)]
        if not in_backward():
            if name == ROOT:
                trace.shapes.update(_shapes(args, kwargs))
            for tensor in given:  # before its parameters: it may be what the last module gave
                self.add(trace, [(self._call, "in", name)], tensor)
            prefix = "" if name == ROOT else f"{name}."
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    self.add(trace, [(self._call, "parameter", prefix + own)], parameter)
        for tensor in given:
            self._follow(trace, (self._call, "grad_in", name), tensor)

    def after(self, passing: Pass, name: str, output: Any) -> None:
        """Its output."""
        trace = passing.kept.get(self) or passing.kept.setdefault(self, Trace())
        call = trace.calls.pop() if trace.calls else 0
        tensor = main_tensor(output)
        if tensor is not None and call:
            if not in_backward():
                self.add(trace, [(call, "out", name)], tensor)
            self._follow(trace, (call, "grad_out", name), tensor)

    def unseen(self, reason: str) -> None:
        """The check's own finding is all there is."""

    def merge(self, a: Trace, b: Trace) -> Trace:
        """The events of two passes; those of the first that are too many are all that is lost."""
        a.merge(b)
        return a

    def rows(self, trace: Trace, training: bool, due: frozenset[Reporter]) -> list[Piece]:
        """The events as rows."""
        pieces: list[Piece] = []
        if not training or self.reporter.gate.failed:
            return pieces
        for (device, _), named in trace.rows.items():
            ends = torch.stack([end for _, both in named for end in both])  # of one type: a kernel for many
            rows = ends.to(row_dtype(device)).view(len(named), 2)
            pieces.append(Piece(self.reporter, [name for name, _ in named], rows))
        return pieces

    def _follow(self, trace: Trace, seen: _Seen, tensor: Tensor) -> None:
        if tensor.requires_grad and tensor.grad_fn is not None:  # a leaf would keep the hook
            hook = joinable(tensor)
            for function in () if hook is None else hook.functions:
                if type(function) is _Follower and function.trace is trace:
                    function.seen.append(seen)
                    return
            listen(tensor, _Follower(self, trace, seen), hook)

    def add(self, trace: Trace, seen: Sequence[_Seen], tensor: Tensor) -> None:
        """A tensor, as these calls saw it."""
        of = tensor.dtype
        if type(tensor) not in dtypes.PLAIN or not (of.is_floating_point or of.is_complex) or not tensor.numel():
            return  # a reduction would not be one operation on elements that are here: a DTensor, or a fake tensor
        if tensor.layout is not torch.strided:
            return
        if (place := tensor.data_ptr()) != self._place:  # all hooks of one gradient see it in turn
            self._place = place
            self._tensor += 1
        room = trace.room(len(seen))
        if room > 0:
            ends = self._ends(tensor)
            rows = trace.rows[tensor.device, ends[0].dtype]
            for i, (call, kind, name) in enumerate(seen[:room], self._turn):
                rows.append((f"{i} {self._tensor} {call} {kind} {name}", ends))
        self._turn += len(seen)

    def _ends(self, tensor: Tensor) -> Ends:
        """Of a tensor that did not change since it was looked at last: what was found then."""
        version = -1 if tensor.is_inference() else tensor._version
        last = self._last
        if last is not None and last[0]() is tensor and last[1] == version >= 0:
            return last[2]
        low, high = (tensor if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 else real(tensor)).aminmax()
        self._last = ref(tensor), version, (low, high)
        return low, high


class _Follower:
    """Hears the gradient of a tensor for all module calls that use it one after another."""

    def __init__(self, of: ValueTrace, trace: Trace, seen: _Seen) -> None:
        self.trace, self.seen, self._of = trace, [seen], of

    def __call__(self, gradient: Tensor) -> None:
        gate = self._of.reporter.gate
        if not gate.failed:
            with gate:
                self._of.add(self.trace, self.seen, gradient)


class StepSnapshots:
    """What it takes to run the last sampled steps again: their random states, and the shapes of their batches.

    Written by the training thread, read by any other.
    """

    def __init__(self, size: int = 20) -> None:
        self._snapshots: deque[StepSnapshot] = deque(maxlen=size)

    def open(self, step: int) -> None:
        """A sampled step begins."""
        self._snapshots.append(StepSnapshot(step, random_state()))

    def saw(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """What its model was called with."""
        if self._snapshots and shapes:
            self._snapshots[-1] = replace(self._snapshots[-1], shapes=shapes)

    def latest(self) -> list[StepSnapshot]:
        """All that are kept, oldest first."""
        return list(self._snapshots)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, value in [*((str(i), value) for i, value in enumerate(args)), *kwargs.items()]:
        for i, tensor in enumerate(tensors_in(value)):
            yield (name if i == 0 else f"{name}.{i}"), tuple(tensor.shape)
