"""The zero-touch clock signal, the process-wide step hooks of `torch.optim`; which optimizers there are, and what they
keep for a parameter."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from torchprobe.capture import compat
from torchprobe.capture.compat import running
from torchprobe.capture.compiled.graphs import in_compiled_call
from torchprobe.capture.gate import Guard, protected
from torchprobe.capture.sharding import lasting_parameters
from torchprobe.statistics.dtypes import measurable

STEP = Optimizer.profile_hook_step(lambda: None).__code__  # the code that runs the hooks, of every optimizer


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
        size = 0
        for group in optimizer.param_groups:
            size += len(group["params"])
        known = self._claims.get(id(optimizer))
        if known is None or known[1] != size or known[0]() is not optimizer:
            known = self._claim(optimizer, size)
        if not known[2]:
            self._observer.other_steps()
            return
        if self._running:  # unless a step that raised left it behind
            under_way = [id(caller["self"]) for caller in running(STEP)]  # this step's own is one of them
            self._running = [r for r in self._running if under_way.count(id(r())) > (r() is optimizer)]
        self._running.append(known[0])
        has_closure = (len(args) > 1 or bool(kwargs)) and _closure_in(args, kwargs)
        if len(self._running) == 1 and self._observer.before_step(optimizer, has_closure):
            self._call_last(optimizer, self._observer.gradients_final)

    @protected
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        under_way = self._running
        if len(under_way) > 1 and under_way[-1]() is optimizer:
            del under_way[-1]
        elif under_way and under_way[0]() is optimizer:
            under_way.clear()
            self._observer.after_step(optimizer, (len(args) > 1 or bool(kwargs)) and _closure_in(args, kwargs))

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

    def _claim(self, optimizer: Optimizer, size: int) -> tuple[ReferenceType[Optimizer], int, bool]:
        self._claims = {key: claim for key, claim in self._claims.items() if claim[0]() is not None}
        claim = self._claims[id(optimizer)] = (ref(optimizer), size, _holds(optimizer, self._parameters()))
        return claim


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
    return any(_holds(optimizer, parameters) for optimizer in _living())


def held_by_living() -> set[int]:
    """The parameters that any optimizer holds, one that may never have stepped too. Looks at all objects: 50 ms."""
    return {id(p) for optimizer in _living() for group in optimizer.param_groups for p in group["params"]}


def _living() -> Iterator[Optimizer]:
    return (o for o in gc.get_objects() if issubclass(type(o), Optimizer))


def _holds(optimizer: Optimizer, parameters: set[int]) -> bool:
    return any(id(p) in parameters for group in optimizer.param_groups for p in group["params"])


def parameter_ids(model: nn.Module | None) -> set[int]:
    """Identities of the model's parameters, to recognise them in an optimizer's groups."""
    return set() if model is None else {id(parameter) for parameter in lasting_parameters(model)}


def held_by(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """The parameters that an optimizer holds; frozen ones may be trained later, or have a gradient that it uses."""
    return (p for group in optimizer.param_groups for p in group["params"])


# ---- what an optimizer keeps for a parameter

KNOWN: Mapping[str, frozenset[str]] = {
    "momenta": frozenset({"exp_avg", "momentum_buffer"}),
    "second_moments": frozenset({"exp_avg_sq", "square_avg"}),
}
_SOURCES = {name: source for source, names in KNOWN.items() for name in names}
_NEITHER = frozenset({"max_exp_avg_sq", "exp_inf", "sum", "acc_delta", "grad_avg", "ax", "prev", "step_size", "step"})
_OF_LBFGS = frozenset({"d", "t", "al", "ro", "H_diag", "old_dirs", "old_stps", "prev_flat_grad", "prev_loss"})
_OTHERS = _NEITHER | _OF_LBFGS  # that torch's optimizers keep


class State:
    """What an optimizer keeps for one parameter."""

    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        state = optimizer.state.get(parameter)  # which `[]` would make
        self._values: Mapping[str, object] = state if isinstance(state, dict) else {}
        self.known = {source: self._first(names, parameter) for source, names in KNOWN.items()}
        """The momentum and the second moment; None where it keeps none that is known."""

    def _first(self, names: frozenset[str], parameter: nn.Parameter) -> Tensor | None:
        for name in names:
            if name in self._values:
                value = self._values[name]
                if isinstance(value, Tensor) and value.shape == parameter.shape and measurable(value):
                    return value
        return None

    def unknown(self) -> Iterator[str]:
        """What else it keeps, as far as that may be one of them: names."""
        for name in self._values:
            if name in _OTHERS or (name in _SOURCES and self.known[_SOURCES[name]] is not None):
                continue
            value = self._values[name]
            if isinstance(value, Tensor) and value.numel() > 1:
                yield name
