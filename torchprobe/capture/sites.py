"""One forward hook, shared by all captured modules, and the state that it finds on each of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.capture.gate import Gate, no_autocast
from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.recompute import in_backward, under_transform
from torchprobe.capture.sharding import is_unreduced, local_part
from torchprobe.probes.base import Probe
from torchprobe.statistics.dtypes import row_dtype

SITE = "_torchprobe_site"  # key in a module's __dict__; the copy of a model finds None there


class Pass:
    """What the running forward pass of the model is: shared by all its sites."""

    def __init__(self) -> None:
        self.began = False  # a training pass began after the last completed step
        self.training = True
        self.entered = 0  # forward passes, a compiled model's not among them
        self.seen = False  # the model itself was called, not only its parts
        self.compiled = False  # a hook was traced: hooks stay on, and only flags change


class Tap:
    """One probe at one module: its merged statistics, apart for training and validation.

    Each row holds the probe's fields and, last, the number of calls merged into it.
    """

    def __init__(self, probe: Probe, gate: Gate, device: torch.device) -> None:
        self.probe = probe
        self.gate = gate
        self.train = torch.zeros(probe.width + 1, dtype=row_dtype(device), device=device)
        self.val = torch.zeros_like(self.train)

    def add(self, tensor: Tensor, training: bool) -> None:
        """Merge one more tensor. Traces under `torch.compile`; the row keeps its identity."""
        with torch.no_grad(), no_autocast(tensor.device):
            row = self._row(tensor.device, training)
            new = self.probe.compute(tensor.detach()).to(row.dtype)
            merged = torch.where(row[-1] > 0, self.probe.combine(row[:-1], new), new)
            row.copy_(torch.cat([merged, row[-1:] + 1]))

    def _row(self, device: torch.device, training: bool) -> Tensor:
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


class Site:
    """What the hook finds on a module. Copies and pickles become None, so that they are inert."""

    def __init__(self, name: str, current: Pass, outputs: tuple[Tap, ...], gradients: tuple[Tap, ...]) -> None:
        self.name = name
        self.current = current
        self.outputs = outputs
        self.gradients = gradients

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())


def observe_output(module: nn.Module, args: Any, output: Any) -> None:
    """The forward hook: feeds the module's main output tensor, and its gradient, to the taps."""
    site = module.__dict__.get(SITE)
    if site is None:
        return
    if torch.compiler.is_compiling():
        site.current.compiled = True
        _observe(site, output, first_pass=True)
    elif not under_transform():
        _observe(site, output, first_pass=not in_backward())


def _observe(site: Site, output: Any, first_pass: bool) -> None:
    tensor = main_tensor(output)
    if tensor is None:
        return
    training = site.current.training
    if first_pass:
        for tap in site.outputs:
            if tap.gate.train if training else tap.gate.val:
                _observe_tensor(tap, tensor, training)
    # Recomputed outputs need the hook too: reentrant checkpointing builds its graph only then.
    if training and tensor.requires_grad:
        for tap in site.gradients:
            if tap.gate.train:
                tensor.register_hook(functools.partial(_observe_tensor, tap))


def _observe_tensor(tap: Tap, tensor: Tensor, training: bool = True) -> None:
    if torch.compiler.is_compiling():
        tap.add(tensor, training)
    elif not tap.gate.failed:
        with tap.gate.boundary(), torch._C.DisableTorchFunction():  # no mode, the user's or ours, need see it
            if not is_unreduced(tensor):
                tap.add(local_part(tensor), training)
