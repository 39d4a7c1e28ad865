"""One forward hook, shared by all captured modules, and the state that it finds on each of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.recompute import in_backward, under_transform
from torchprobe.capture.sharding import is_unreduced, local_part
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
        tap.merge(tensor, training)
    elif not tap.gate.failed:
        with tap.gate.boundary(), torch._C.DisableTorchFunction():  # no mode, the user's or ours, need see it
            if not is_unreduced(tensor):
                tap.add(local_part(tensor), training)
