"""One forward hook, shared by all captured modules, and the state that it finds on each of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.capture.compat import REPLICA, in_backward, under_transform
from torchprobe.capture.compiled import operators as opaque
from torchprobe.capture.compiled.tracing import beside, gradient_hooks_trace, run_in, scope
from torchprobe.capture.gate import no_autocast
from torchprobe.capture.inert import Inert
from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.taps import Tap

SITE = "_torchprobe_site"  # key in a module's __dict__; the copy of a model finds None there


class Pass:
    """What the running forward pass of the model is: shared by all its sites."""

    def __init__(self) -> None:
        self.began = False  # a training pass began after the last completed step
        self.training = True
        self.entered = 0  # forward passes, a compiled model's not among them
        self.seen = False  # the model itself was called, not only its parts
        self.compiled = False  # a hook was traced: hooks stay on, and only flags change
        self.fired = False  # a hook ran outside of graphs in this step
        self.sampled = False  # a probe of passes is due in training: the one flag that tells two graphs apart
        self.sampled_val = False  # and in validation


class Site(Inert):
    """What the hook finds on a module."""

    def __init__(self, name: str, current: Pass, outputs: tuple[Tap, ...], gradients: tuple[Tap, ...]) -> None:
        self.name = name
        self.current = current
        self.outputs = outputs
        self.gradients = gradients


def observe_output(module: nn.Module, args: Any, output: Any) -> None:
    """The forward hook: feeds the module's main output tensor, and its gradient, to the taps."""
    site = module.__dict__.get(SITE)
    if site is None:
        return
    if torch.compiler.is_compiling():
        _trace(site, output)
    elif REPLICA not in module.__dict__:
        beside(_observe, site, output)


def _observe(site: Site, output: Any) -> None:
    site.current.fired = True
    tensor = None if under_transform() else main_tensor(output)
    if tensor is None:
        return
    training = site.current.training
    if not in_backward():
        for tap in site.outputs:
            if tap.gate.train if training else tap.gate.val:
                tap.record_tensor(tensor, training)
    # Recomputed outputs need the hook too: reentrant checkpointing builds its graph only then.
    if training and tensor.requires_grad:
        for tap in site.gradients:
            if tap.gate.train:
                tensor.register_hook(tap.record_tensor)


def _trace(site: Site, output: Any) -> None:
    where = scope()
    if where == "elsewhere":
        return
    run_in(where, note_compiled, site.current)
    training = site.current.training
    tensor = main_tensor(output)
    if tensor is None or not (site.current.sampled if training else site.current.sampled_val):
        return
    for tap in site.outputs:
        _trace_tensor(tap, training, False, tensor)
    if training and tensor.requires_grad and gradient_hooks_trace():
        for tap in site.gradients:
            tensor.register_hook(functools.partial(_trace_tensor, tap, training, True))


def _trace_tensor(tap: Tap, training: bool, gradient: bool, tensor: Tensor) -> None:
    """The statistic becomes part of the graph, and is fused with it; merging, many tiny operations, does not."""
    with torch.no_grad(), no_autocast(tensor.device):
        if tap.traces:
            opaque.row(tap.handle, tap.probe.compute(tensor.detach()), training, gradient)
        else:
            opaque.tensor(tap.handle, tensor.detach(), training, gradient)


def note_compiled(current: Pass) -> None:
    """A hook is being traced."""
    current.compiled = True
