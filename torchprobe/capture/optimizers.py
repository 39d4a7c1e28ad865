"""The zero-touch clock signal, the process-wide step hooks of `torch.optim`, and what state gradients are in."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from torchprobe.capture import compat
from torchprobe.capture.compat import running
from torchprobe.capture.compiled.graphs import in_compiled_call
from torchprobe.capture.fully_sharded import lasting_parameters
from torchprobe.capture.gate import Guard, protected

_FEW = 1024  # elements of a gradient that are looked at
_MOST = 4096  # parameters that are looked at, when the few tell nothing
_STEP = Optimizer.profile_hook_step(lambda: None).__code__  # the code that runs the hooks, of every optimizer


class StepObserver(Protocol):
    """Hears of each step of the optimizers that train the model."""

    guard: Guard

    def other_steps(self) -> None:
        """An optimizer of another model steps."""

    def before_step(self, optimizer: Optimizer, has_closure: bool) -> bool | None:
        """The step begins. Whether `gradients_final` is wanted."""

    def gradients_final(self, optimizer: Optimizer) -> None:
        """Gradients are what the optimizer will use: all other hooks have run."""

    def after_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """The parameters are updated."""


class OptimizerHooks:
    """Follows every optimizer that holds a parameter of the model, made before or after this.

    A step inside another one is part of it: that of a parent class, or of an optimizer that is wrapped.
    """

    def __init__(self, parameters: Callable[[], set[int]], observer: StepObserver) -> None:
        self._parameters = parameters
        self.guard = observer.guard
        self._observer = observer
        # By identity, with weak references that have no callback: several of these on one object, in garbage of ours
        # that is collected while the object dies, crash Python 3.11.
        self._claims: dict[int, tuple[ReferenceType[Optimizer], int, bool]] = {}
        self._running: list[ReferenceType[Optimizer]] = []  # steps under way, outermost first
        self._handles: list[RemovableHandle] = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        # First in line: behind ours, a user's hook that takes itself off would make torch raise.
        both = (compat.optimizer_pre_hooks(), compat.optimizer_post_hooks())
        for hooks, handle in zip(both, self._handles, strict=True):
            if hooks is not None:
                hooks.move_to_end(handle.id, last=False)

    def remove(self) -> None:
        """Take the hooks off. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self._claims.clear()

    @protected
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._claimed(optimizer):
            self._observer.other_steps()
            return
        if self._running:  # unless a step that raised left it behind
            under_way = {id(caller["self"]) for caller in running(_STEP)}
            self._running = [r for r in self._running if id(r()) in under_way and r() is not optimizer]
        self._running.append(ref(optimizer))
        has_closure = (len(args) > 1 or bool(kwargs)) and _closure_in(args, kwargs)
        if len(self._running) == 1 and self._observer.before_step(optimizer, has_closure):
            self._call_last(optimizer, self._observer.gradients_final)

    @protected
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        under_way = self._running
        if under_way and under_way[0]() is optimizer:
            under_way.clear()
            self._observer.after_step(optimizer, (len(args) > 1 or bool(kwargs)) and _closure_in(args, kwargs))
        elif under_way and under_way[-1]() is optimizer:
            del under_way[-1]

    def _call_last(self, optimizer: Optimizer, function: Callable[[Optimizer], None]) -> None:
        """Call a function when the step's other pre-hooks have run; now, when there are none or a graph would break.

        It takes the place of the last hook for one call: one hook more, behind a user's that takes itself off, would
        make torch raise.
        """
        hooks = compat.own_step_hooks(optimizer) or compat.optimizer_pre_hooks()
        key = next(reversed(hooks)) if hooks else None
        if hooks is None or key is None or key == self._handles[0].id or in_compiled_call():
            function(optimizer)
        else:
            hooks[key] = _followed_by(hooks, key, optimizer, function)

    def _claimed(self, optimizer: Optimizer) -> bool:
        size = 0
        for group in optimizer.param_groups:
            size += len(group["params"])
        known = self._claims.get(id(optimizer))
        if known is None or known[1] != size or known[0]() is not optimizer:
            self._claims = {key: claim for key, claim in self._claims.items() if claim[0]() is not None}
            known = self._claims[id(optimizer)] = (ref(optimizer), size, _holds(optimizer, self._parameters()))
        return known[2]


def _followed_by(
    hooks: OrderedDict[int, Any], key: int, optimizer: Optimizer, function: Callable[[Optimizer], None]
) -> Callable[..., Any]:
    """A hook that stands in for another one, once, and calls a function after it."""
    hook = hooks[key]

    def both(stepping: Optimizer, args: Any, kwargs: Any) -> Any:
        if hooks.get(key) is both:
            hooks[key] = hook
        answer = hook(stepping, args, kwargs)
        if stepping is optimizer:
            function(optimizer)
        return answer

    return both


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


class GradientState:
    """Whether the gradients of some parameters were zeroed, or have grown, since they were last looked at.

    Looks at four of the parameters: two that are next to each other at either end, since one alone may have no
    gradient, or one that is exactly 0, as the first matrix of a low-rank adapter has while the second is 0.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: Optimizer | None = None) -> None:
        self.of: Callable[[], Optimizer | None] = ref(optimizer) if optimizer is not None else lambda: None
        self._parameters = [ref(p) for p in parameters]
        self._few = _ends(self._parameters)
        self._seen: list[tuple[int, int] | None] = [None] * len(self._few)  # when a backward pass began
        self._left = self._seen.copy()  # when it had ended

    def look(self) -> bool:
        """A backward pass begins: remember the gradients as they are. Whether there are some, of those few."""
        there = False
        for i, weak in enumerate(self._few):
            parameter = weak()
            gradient = None if parameter is None else parameter.grad
            self._seen[i] = None if gradient is None else (id(gradient), gradient._version)
            there = there or gradient is not None
        return there

    def grew(self) -> bool:
        """Whether a backward pass has given the parameters gradients since `look`."""
        grew = False
        for i, weak in enumerate(self._few):
            parameter = weak()
            gradient = None if parameter is None else parameter.grad
            now = self._left[i] = None if gradient is None else (id(gradient), gradient._version)
            if gradient is not None and now != self._seen[i]:
                if gradient.is_cpu:  # where its values tell later whether it is still there
                    return True
                grew = True
        return grew

    def zeroed(self, thorough: bool) -> bool:
        """Whether there is no gradient: none at all, or zeros in host memory, or one that was written over.

        thorough: look at all parameters before saying so. Off the CPU values cannot be looked at: there a gradient
        that has changed since the last backward pass counts as zeroed.
        """
        for weak, left in zip(self._few, self._left, strict=True):
            if (p := weak()) is not None and p.grad is not None and _holds_gradient(weak, left):
                return False
        return not (thorough and any(_holds_gradient(weak, _state(weak)) for weak in self._parameters[:_MOST]))

    def choose(self) -> None:
        """Look at parameters that have gradients, when those that were looked at have none. At most once a step."""
        for weak in self._few:
            if (p := weak()) is not None and p.grad is not None:
                return
        if self._few:
            having = [weak for weak in self._parameters if (p := weak()) is not None and p.grad is not None]
            if having:
                self._few = _ends(having)
                self._seen, self._left = [None] * len(self._few), [None] * len(self._few)


def _ends(parameters: list[ReferenceType[nn.Parameter]]) -> list[ReferenceType[nn.Parameter]]:
    small = [weak for weak in parameters if (p := weak()) is not None and p.numel() <= _FEW]
    chosen = small if len(small) > 1 else parameters
    return chosen if len(chosen) <= 4 else [*chosen[:2], *chosen[-2:]]


def _state(weak: ReferenceType[nn.Parameter]) -> tuple[int, int] | None:
    parameter = weak()
    gradient = None if parameter is None else parameter.grad
    return None if gradient is None else (id(gradient), gradient._version)


def _holds_gradient(weak: ReferenceType[nn.Parameter], left: tuple[int, int] | None) -> bool:
    parameter = weak()
    gradient = None if parameter is None else parameter.grad
    if gradient is None:
        return False
    return _any(gradient) if gradient.is_cpu else _state(weak) == left


def _any(gradient: Tensor) -> bool:
    """Whether a gradient in host memory holds anything but zeros, among at most about a thousand of its elements."""
    if type(gradient) is not Tensor or gradient.layout is not torch.strided:
        return True
    if gradient.numel() > _FEW:
        gradient = gradient.reshape(-1)[:: gradient.numel() // _FEW]
    if gradient.dtype is torch.bfloat16:  # numpy has none
        gradient = gradient.float()
    return bool(gradient.numpy().any())  # in host memory


def trained(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """The parameters that an optimizer holds and trains."""
    return (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
