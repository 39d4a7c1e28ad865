"""The zero-touch clock signal: the process-wide step hooks of `torch.optim`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.compat import running
from torchprobe.capture.fully_sharded import lasting_parameters

_STEP = Optimizer.profile_hook_step(lambda: None).__code__  # the code that runs the hooks, of every optimizer


class StepObserver(Protocol):
    """Hears of each step of the optimizers that train the model."""

    def before_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Gradients are what the optimizer will use, unless a closure makes them during the step."""

    def after_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """The parameters are updated."""


class OptimizerHooks:
    """Follows every optimizer that holds a parameter of the model, made before or after this.

    A step inside another one is part of it: that of a parent class, or of an optimizer that is wrapped. Which
    steps are running is read from the callers' frames, so that a step that raises leaves no state behind.
    """

    def __init__(self, parameters: Callable[[], set[int]], observer: StepObserver) -> None:
        self._parameters = parameters
        self._observer = observer
        self._claims: WeakKeyDictionary[Optimizer, tuple[int, bool]] = WeakKeyDictionary()
        self._handles: list[RemovableHandle] = [
            register_optimizer_step_pre_hook(torch.compiler.disable(self._before)),
            register_optimizer_step_post_hook(torch.compiler.disable(self._after)),
        ]

    def remove(self) -> None:
        """Take the hooks off. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._follows(optimizer):
            self._observer.before_step(optimizer, _closure_in(args, kwargs))

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._follows(optimizer):
            self._observer.after_step(optimizer, _closure_in(args, kwargs))

    def _follows(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer trains the model, and its step is inside no other such one."""
        if not self._claimed(optimizer):
            return False
        steps = running(_STEP)
        return len(steps) <= 1 or sum(self._claimed(caller["self"]) for caller in steps) <= 1

    def _claimed(self, optimizer: Optimizer) -> bool:
        size = 0
        for group in optimizer.param_groups:
            size += len(group["params"])
        known = self._claims.get(optimizer)
        if known is None or known[0] != size:
            known = self._claims[optimizer] = (size, self._holds_ours(optimizer))
        return known[1]

    def _holds_ours(self, optimizer: Optimizer) -> bool:
        return _holds(optimizer, self._parameters())


def _closure_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `step` got a closure: `args` holds the optimizer itself first."""
    return any(map(callable, (*args[1:], kwargs.get("closure"))))


def any_alive(parameters: set[int]) -> bool:
    """Whether an optimizer of these parameters exists that may never have stepped. Looks at all objects: 50 ms.

    Remembers nothing: the call may run on other weights than the optimizer's (`functional_call`).
    """
    return any(issubclass(type(o), Optimizer) and _holds(o, parameters) for o in gc.get_objects())


def _holds(optimizer: Optimizer, parameters: set[int]) -> bool:
    return any(id(p) in parameters for group in optimizer.param_groups for p in group["params"])


def parameter_ids(model: nn.Module) -> set[int]:
    """Identities of the model's parameters, to recognise them in an optimizer's groups."""
    return {id(parameter) for parameter in lasting_parameters(model)}
