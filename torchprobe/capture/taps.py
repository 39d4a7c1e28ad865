"""One probe at one module: what its outputs add up to within a step."""

from __future__ import annotations

import functools
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from torchprobe.capture import opaque
from torchprobe.capture.gate import Gate, no_autocast, no_graph
from torchprobe.capture.sharding import is_unreduced, local_part
from torchprobe.probes.base import Probe, Reporter
from torchprobe.statistics.dtypes import row_dtype

_MANY = 64  # rows that wait to be merged


class Memo:
    """Rows of the tensor seen last: a block often returns what its last part returned."""

    def __init__(self) -> None:
        self._last: tuple[ReferenceType[Tensor], int, dict[Probe, Tensor]] | None = None

    def row(self, probe: Probe, tensor: Tensor) -> Tensor:
        """The probe's row of a tensor in host memory: computed, unless the tensor is the last one, as it was then."""
        if tensor.is_inference():  # which has no version
            return _row(probe, tensor)
        last = self._last
        if last is None or last[0]() is not tensor or last[1] != tensor._version:
            last = self._last = ref(tensor), tensor._version, {}
        rows = last[2]
        if probe not in rows:
            rows[probe] = _row(probe, tensor)
        return rows[probe]


class Tap:
    """One probe at one module: its merged statistics, apart for training and validation.

    Each row holds the probe's fields and, last, the number of calls merged into it. Inside a compiled graph and off
    the CPU a call is merged at once and in place, into `train` or `val`. In host memory rows wait until the step is
    gathered: most modules run once in a step, and then there is nothing to merge.
    """

    def __init__(self, reporter: Reporter, gate: Gate, device: torch.device, memo: Memo) -> None:
        probe = reporter.probe
        self.reporter = reporter
        self.probe = probe
        self.gate = gate
        self.train = torch.zeros(probe.width + 1, dtype=row_dtype(device), device=device)
        self.val = torch.zeros_like(self.train)
        self.handle = opaque.handle(self)
        self.traces = type(probe).__module__.startswith("torchprobe.")  # what others wrote may not, and may raise
        self._memo = memo
        self._waiting: dict[bool, list[Tensor]] = {True: [], False: []}

    def add(self, tensor: Tensor, training: bool) -> None:
        """One more tensor, in eager code."""
        if tensor.is_cpu:
            self._keep(tensor, self._waiting[training])
        else:
            self.merge(tensor, training)

    def record_tensor(self, tensor: Tensor, training: bool = True) -> None:
        """One more tensor, unless the probe is switched off; an exception switches it off."""
        if torch.compiler.is_compiling():  # compiled autograd
            self.merge(tensor, training)
        elif not self.gate.failed:
            with self.gate.boundary(), torch._C.DisableTorchFunction():  # no mode, the user's or ours, need see it
                if not is_unreduced(tensor):
                    self.add(local_part(tensor), training)

    def record_row(self, new: Tensor, training: bool) -> None:
        """What a compiled graph has computed of one more tensor."""
        with self.gate.boundary(), torch._C.DisableTorchFunction(), torch.no_grad():
            self._merge_row(new, training)

    def merge(self, tensor: Tensor, training: bool) -> None:
        """One more tensor, merged at once."""
        with torch.no_grad(), no_autocast(tensor.device):
            self._merge_row(self.probe.measure(tensor.detach()), training)

    def _merge_row(self, new: Tensor, training: bool) -> None:
        """The row keeps its identity."""
        row = self._row_on(new.device, training)
        new = new.to(row.dtype)
        merged = torch.where(row[-1] > 0, self.probe.combine(row[:-1], new), new)
        row.copy_(torch.cat([merged, row[-1:] + 1]))

    def take(self, training: bool, compiled: bool) -> Tensor:
        """The row of all calls. What was merged in place is there until it is zeroed."""
        row = self.train if training else self.val
        waiting, self._waiting[training] = self._waiting[training], []
        if not waiting:
            return row
        if compiled and row.is_cpu:
            waiting.insert(0, row)
        if len(waiting) == 1:
            return waiting[0]
        with self.gate.boundary(), torch.no_grad():
            return functools.reduce(self._merged, waiting)
        return torch.zeros_like(row)  # the boundary took an exception

    def _keep(self, tensor: Tensor, waiting: list[Tensor]) -> None:
        with no_graph(), no_autocast(tensor.device):
            waiting.append(self._memo.row(self.probe, tensor))
            if len(waiting) == _MANY:
                waiting[:] = [functools.reduce(self._merged, waiting)]

    def _merged(self, a: Tensor, b: Tensor) -> Tensor:
        """The row of the calls of both; there may be none in the first."""
        fields = torch.where(a[-1] > 0, self.probe.combine(a[:-1], b[:-1]), b[:-1])
        return torch.cat([fields, a[-1:] + b[-1:]])

    def _row_on(self, device: torch.device, training: bool) -> Tensor:
        row = self.train if training else self.val
        if row.device == device:
            return row
        with torch.inference_mode(False):  # the model moved; a row outlives the mode it is made in
            row = torch.zeros(row.shape, dtype=row_dtype(device), device=device)
        if training:
            self.train = row
        else:
            self.val = row
        return row


def _row(probe: Probe, tensor: Tensor) -> Tensor:
    row = probe.measure(tensor.detach()).to(row_dtype(tensor.device))
    return torch.cat((row, row.new_ones(1)))
