"""One probe at one module: what its outputs add up to within a step."""

from __future__ import annotations

import functools
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from torchprobe.capture.gate import Gate, no_autocast
from torchprobe.probes.base import Probe
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

    def __init__(self, probe: Probe, gate: Gate, device: torch.device, memo: Memo) -> None:
        self.probe = probe
        self.gate = gate
        self.train = torch.zeros(probe.width + 1, dtype=row_dtype(device), device=device)
        self.val = torch.zeros_like(self.train)
        self._memo = memo
        self._waiting: dict[bool, list[Tensor]] = {True: [], False: []}

    def add(self, tensor: Tensor, training: bool) -> None:
        """One more tensor, in eager code."""
        if tensor.is_cpu:
            self._keep(tensor, self._waiting[training])
        else:
            self.merge(tensor, training)

    def merge(self, tensor: Tensor, training: bool) -> None:
        """One more tensor, merged at once. Traces under `torch.compile`; the row keeps its identity."""
        with torch.no_grad(), no_autocast(tensor.device):
            row = self._row_on(tensor.device, training)
            new = self.probe.compute(tensor.detach()).to(row.dtype)
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
        with torch.no_grad(), no_autocast(tensor.device):
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
    row = torch.ones(probe.width + 1, dtype=row_dtype(tensor.device), device=tensor.device)
    row[:-1] = probe.compute(tensor.detach())
    return row
