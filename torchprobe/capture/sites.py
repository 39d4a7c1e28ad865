"""One forward hook, shared by all captured modules, and the state that it finds on each of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from torchprobe.buffer.transfer import records_graph
from torchprobe.capture.backward import roots
from torchprobe.capture.compat import REPLICA, in_backward, no_torch_function, under_transform
from torchprobe.capture.compiled import operators
from torchprobe.capture.compiled.operators import GradientHook, listen
from torchprobe.capture.compiled.tracing import (
    becomes_device_graph,
    beside,
    constant,
    gradient_hooks_trace,
    keeps_address,
    run_in,
    scope,
)
from torchprobe.capture.gate import no_autocast, no_graph
from torchprobe.capture.module_hooks import Inert
from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.sharding import is_unreduced, local_part
from torchprobe.capture.source import Pass, Running
from torchprobe.probes.base import Probe, Reporter
from torchprobe.probes.checks import combined
from torchprobe.statistics.dtypes import measurable, row_dtype

SITE = "_torchprobe_site"  # key in a module's __dict__; the copy of a model finds None there

_MANY = 64  # rows that wait to be merged

Row: TypeAlias = tuple[Tensor, int]
"""A probe's fields, and the number of calls that they are of."""

Kept: TypeAlias = "dict[Tap, list[Row]]"
"""What a pass gave."""


class Memo:
    """Rows of the tensor seen last: a block often returns what its last part returned."""

    def __init__(self) -> None:
        self._last: tuple[ReferenceType[Tensor], int, dict[Probe, Tensor]] | None = None

    def row(self, probe: Probe, tensor: Tensor) -> Tensor:
        """The probe's row of a tensor: computed, unless the tensor is the last one, as it was then."""
        if tensor.is_inference():  # which has no version
            return _row(probe.measure(tensor.detach()))
        last = self._last
        if last is None or last[0]() is not tensor or last[1] != tensor._version:
            last = self._last = ref(tensor), tensor._version, {}
        rows = last[2]
        if probe not in rows:
            rows[probe] = _row(probe.measure(tensor.detach()))
        return rows[probe]


class Tap:
    """One probe at one module. What it measures goes into the pass that the value belongs to."""

    def __init__(self, name: str, reporter: Reporter, keeper: Any, running: Running, memo: Memo) -> None:
        self.name = name
        self.reporter = reporter
        self.probe = reporter.probe
        self.handle = operators.handle(self)
        self.traces = type(self.probe).__module__.startswith("torchprobe.")  # what others wrote may not, and may raise
        self._keeper = keeper  # under which a pass keeps its rows
        self._running = running
        self._memo = memo
        self.lines: Tensor | None = None

    def add(self, passing: Pass, tensor: Tensor) -> None:
        """One more tensor, in eager code and no graph, unless the probe is off; an exception switches it off."""
        gate = self.reporter.gate
        if not gate.failed:
            with gate:
                if not is_unreduced(tensor):
                    local = local_part(tensor)
                    with no_autocast(local.device):
                        self._keep(passing, self._memo.row(self.probe, local))

    def record_tensor(self, tensor: Tensor, training: bool, gradient: bool) -> None:
        """A tensor that a compiled graph hands over as it is."""
        passing = self._pass_of_graph(training, gradient)
        if passing is not None:
            with no_torch_function(), no_graph():
                self.add(passing, tensor)

    def record_row(self, new: Tensor, training: bool, gradient: bool) -> None:
        """What a compiled graph has computed of one more tensor."""
        passing = self._pass_of_graph(training, gradient)
        if passing is not None:
            with self.reporter.gate.boundary(), no_torch_function(), torch.no_grad():
                self._keep(passing, _row(new).clone())  # the compiler writes something else into this memory

    def add_in_place(self, tensor: Tensor) -> None:
        """At each replay of the graph of the device that is captured now, on a sampled step."""
        gate = self.reporter.gate
        if not gate.failed:
            with gate, no_graph(), no_autocast(tensor.device):
                self._running.in_place.add(self.reporter, self.name, tensor)

    @constant
    def has_lines(self, kind: str, index: int | None) -> bool:
        """Whether the probe's sums can be added up in place, on this device: then `lines` is where."""
        self.lines = self._running.in_place.lines(
            self.reporter, self.name, torch.device(kind if index is None else f"{kind}:{index}")
        )
        return self.lines is not None and keeps_address(self.lines)

    def merged(self, rows: Sequence[Row]) -> Row:
        """The row of all calls."""
        return functools.reduce(self._both, rows) if len(rows) > 1 else rows[0]

    def shortened(self, rows: list[Row]) -> list[Row]:
        """The same rows, merged when they are many."""
        return rows if len(rows) < _MANY else [self.merged(rows)]

    def _pass_of_graph(self, training: bool, gradient: bool) -> Pass | None:
        passing = self._running.of_backward() if gradient else self._running.of_graph(training)
        return passing if passing is not None and self.reporter in passing.due else None

    def _keep(self, passing: Pass, row: Tensor) -> None:
        kept = passing.kept.setdefault(self._keeper, {})
        if self in kept:
            kept[self] = self.shortened([*kept[self], (row, 1)])
        else:
            kept[self] = [(row, 1)]

    def _both(self, a: Row, b: Row) -> Row:
        return combined(self.probe, a[0], b[0].to(a[0].device)), a[1] + b[1]


def _row(fields: Tensor) -> Tensor:
    return fields if fields.dtype == torch.float64 else fields.to(row_dtype(fields.device))


class Site(Inert):
    """What the hook finds on a module. lasting: whether a hook may stay there in evaluation."""

    def __init__(self, name: str, module: nn.Module, running: Running, lasting: bool, *taps: tuple[Tap, ...]) -> None:
        self.name = name
        self.module = ref(module)
        self.running = running
        self.lasting = lasting
        self.outputs, self.gradients = taps


def observe_output(module: nn.Module, args: Any, output: Any) -> None:
    """The forward hook: feeds the module's main output tensor, and its gradient, to the taps."""
    site = module.__dict__.get(SITE)
    if site is None:
        return
    if torch.compiler.is_compiling():
        _trace(site, output)
    elif REPLICA not in module.__dict__:
        with site.running.meter, no_torch_function():  # no mode, the user's or ours, need see it
            beside(_observe, site, module, output)


def _observe(site: Site, module: nn.Module, output: Any) -> None:
    running = site.running
    if running.in_place.ready and records_graph():
        if module.training and torch.is_grad_enabled() and not in_backward():
            _capture(site, main_tensor(output))
        return
    recomputing = in_backward()
    running.note_fired()
    tensor = None if under_transform() else main_tensor(output)
    if tensor is None or not measurable(tensor):
        _say_left_out(site, output if tensor is None else tensor)
        return
    part = module if site.lasting else None
    outside = running.of_call(part, tensor) if module.training and not recomputing else running.forward()
    passing = running.of_backward() if recomputing else outside
    if passing is None:
        return
    if not recomputing:
        with no_graph():
            for tap in site.outputs:
                if tap.reporter in passing.due:
                    tap.add(passing, tensor)
    # Recomputed outputs need the hook too: reentrant checkpointing builds its graph only then.
    if passing.training and tensor.requires_grad:
        taps = [tap for tap in site.gradients if tap.reporter in passing.due]
        if taps:
            _follow_gradient(taps, passing, tensor)


def _say_left_out(site: Site, output: Any) -> None:
    if isinstance(output, Tensor) and (output.is_nested or output.layout is not torch.strided):
        kind = "nested" if output.is_nested else str(output.layout)
        for tap in (*site.outputs, *site.gradients)[:1]:
            tap.reporter.whole.remark(f"outputs that are {kind} tensors are left out: statistics are of dense ones")


def _capture(site: Site, tensor: Tensor | None) -> None:
    """The user captures a graph of the device, whose replays are to add up."""
    if tensor is None or not measurable(tensor):
        return
    for tap in site.outputs:
        tap.add_in_place(tensor)
    if tensor.grad_fn is not None:
        for tap in site.gradients:
            listen(tensor, tap.add_in_place)


def _follow_gradient(taps: Sequence[Tap], passing: Pass, tensor: Tensor) -> None:
    """One hook for all taps. On a leaf, such as a parameter that a module returns, it would stay: the pass has it."""
    if tensor.grad_fn is None:
        weak = ref(passing)
        passing.hold(tensor.register_hook(GradientHook(lambda gradient: _add_gradient(taps, weak(), gradient))))
    else:
        listen(tensor, functools.partial(_add_gradient, taps, passing))


def _add_gradient(taps: Sequence[Tap], passing: Pass | None, gradient: Tensor) -> None:
    """Not of a backward pass for inputs alone, or whose gradients a loss is made of: those of the loss may follow."""
    if passing is not None and measurable(gradient):
        with taps[0].reporter.gate:
            call = roots()
            for tap in taps if call.for_parameters and not call.again else ():
                tap.add(passing, gradient)


def _trace(site: Site, output: Any) -> None:
    where = scope()
    if where == "elsewhere":
        return
    run_in(where, note_compiled, site.running)
    training = site.running.training
    tensor = main_tensor(output)
    plain = where == "graph" and training and torch.is_grad_enabled()  # a checkpoint would add up twice
    if tensor is not None and plain and becomes_device_graph() and _trace_in_place(site, tensor):
        return
    if tensor is None or not (site.running.sampled if training else site.running.sampled_val):
        return
    for tap in site.outputs:
        _trace_tensor(tap, training, False, tensor)
    if training and tensor.requires_grad and gradient_hooks_trace():
        for tap in site.gradients:
            tensor.register_hook(functools.partial(_trace_tensor, tap, training, True))


def _trace_in_place(site: Site, tensor: Any) -> bool:
    """Whether one graph serves sampled steps and all others: a graph of the device, in which a flag of its tells."""
    device = tensor.device
    if not all([tap.has_lines(device.type, device.index) for tap in (*site.outputs, *site.gradients)]):  # noqa: C419
        return False
    for tap in site.outputs:
        _trace_adding(tap, tensor)
    if tensor.requires_grad and gradient_hooks_trace():
        for tap in site.gradients:
            tensor.register_hook(functools.partial(_trace_adding, tap))
    return True


def _trace_adding(tap: Tap, tensor: Tensor) -> Tensor:
    with torch.no_grad():
        operators.add_in_place(tap.lines, tensor.detach())
    return tensor


def _trace_tensor(tap: Tap, training: bool, gradient: bool, tensor: Tensor) -> Tensor:
    """The statistic becomes part of the graph, and is fused with it; merging, many tiny operations, does not."""
    with torch.no_grad(), no_autocast(tensor.device):
        if tap.traces:
            operators.row(tap.handle, tap.probe.measure(tensor.detach()), training, gradient)
        else:
            operators.tensor(tap.handle, tensor.detach(), training, gradient)
    return tensor  # in a step that is compiled with its backward pass None would leave no gradient


def note_compiled(running: Running) -> None:
    """A hook is being traced."""
    running.compiled = True
