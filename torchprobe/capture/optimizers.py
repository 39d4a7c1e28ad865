"""The zero-touch clock signal: the process-wide step hooks of `torch.optim`."""

from __future__ import annotations

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


class StepObserver(Protocol):
    """Hears of each step of the optimizers that train the model."""

    def before_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Gradients are what the optimizer will use, unless a closure makes them during the step."""

    def after_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """The parameters are updated."""


class OptimizerHooks:
    """Follows every optimizer that holds a parameter of the model, made before or after this.

    A subclass that calls its parent's `step` fires twice; only the outer call counts.
    """

    def __init__(self, parameters: Callable[[], set[int]], observer: StepObserver) -> None:
        self._parameters = parameters
        self._observer = observer
        self._claims: WeakKeyDictionary[Optimizer, tuple[int, bool]] = WeakKeyDictionary()
        self._inside: WeakKeyDictionary[Optimizer, tuple[int, bool]] = WeakKeyDictionary()
        self._handles: list[RemovableHandle] = [
            register_optimizer_step_pre_hook(torch.compiler.disable(self._before)),
            register_optimizer_step_post_hook(torch.compiler.disable(self._after)),
        ]

    def forget_unfinished(self) -> None:
        """A forward pass begins outside any closure: a step that raised will never report its end."""
        for optimizer in [o for o, (_, closure) in self._inside.items() if not closure]:
            del self._inside[optimizer]

    def remove(self) -> None:
        """Take the hooks off. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._claimed(optimizer):
            return
        depth, closure = self._inside.get(optimizer, (0, _closure_in(args, kwargs)))
        self._inside[optimizer] = depth + 1, closure
        if depth == 0:
            self._observer.before_step(optimizer, closure)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        depth, closure = self._inside.pop(optimizer, (0, False))
        if depth > 1:
            self._inside[optimizer] = depth - 1, closure
        elif depth == 1:
            self._observer.after_step(optimizer, closure)

    def _claimed(self, optimizer: Optimizer) -> bool:
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._claims.get(optimizer)
        if known is None or known[0] != size:
            mine = self._parameters()
            held = any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
            known = self._claims[optimizer] = (size, held)
        return known[1]


def _closure_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `step` got a closure: `args` holds the optimizer itself first."""
    return any(callable(argument) for argument in (*args[1:], kwargs.get("closure")))


def parameter_ids(model: nn.Module) -> set[int]:
    """Identities of the model's parameters, to recognise them in an optimizer's groups."""
    return {id(parameter) for parameter in model.parameters()}
