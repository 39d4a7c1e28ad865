"""Hears of the calls of loss modules, by hooks on the modules themselves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.compat import under_transform
from torchprobe.capture.marks import mark, unmark
from torchprobe.capture.predictions.targets import KINDS

OnCall = Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], None]

_FIRST_WAIT = 100  # steps
_KEY = "_torchprobe_loss"  # in the `__dict__` of a loss module that has our hook


class LossModules:
    """Loss modules of torch's and of classes made from them, wherever they are: in the model, or any object alive.

    A hook stays on its module until `detach`: a compiled function around it is compiled with it, once. It does nothing
    unless told to `listen`. No module is kept alive. on_call: hears of a call with its arguments.

    A look through all objects costs 23 to 80 ms, so there is one at the first sampled training pass, one at the first
    sampled validation pass if training has called none so far, and others only after 100 steps, 1,000 more, 10,000
    more: in validation while training calls none, in training while its gradients do not tell what such a call would.
    A loss may be made late, but mostly it is a function.
    """

    def __init__(self, on_call: OnCall) -> None:
        self._listening = False
        self._on_call = on_call
        self._hook = _Hook(self)
        self._hooked: dict[int, tuple[ReferenceType[nn.Module], RemovableHandle]] = {}
        self._looked_in: set[bool] = set()  # training or not
        self._wait = _FIRST_WAIT
        self._next_look = 0
        self._missed = self._needed = False

    def look_if_due(self, model: nn.Module | None, step: int, training: bool) -> None:
        """An output's targets are sought: put hooks on what there is, if it is time to look."""
        first = training not in self._looked_in and (training or self._missed or not self._hooked)
        if first or (step >= self._next_look and (self._needed if training else self._missed)):
            if not first:
                self._wait *= 10
            self._looked_in.add(training)
            self._missed, self._needed, self._next_look = False, False, step + self._wait
            for module in _loss_modules(model):
                self._put_on(module)

    def listen(self, whether: bool) -> None:
        """Whether calls are of interest."""
        self._listening = whether

    def called(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A loss module has returned."""
        if self._listening and not under_transform():
            self._missed = self._needed = False
            self._on_call(module, args, kwargs)

    def missed(self, needed: bool) -> None:
        """A gradient has arrived, and no loss module was called. needed: the gradient has not told the targets."""
        self._missed, self._needed = True, needed

    def detach(self) -> None:
        """Take every hook off. Safe to call twice."""
        for weak, handle in self._hooked.values():
            handle.remove()
            if (module := weak()) is not None:
                unmark(module, _KEY)
        self._hooked = {}

    def _put_on(self, module: nn.Module) -> None:
        if id(module) not in self._hooked or self._hooked[id(module)][0]() is not module:
            # A class of the user's may have a method of this name.
            handle = nn.Module.register_forward_hook(module, self._hook, with_kwargs=True)
            self._hooked[id(module)] = ref(module), handle
            mark(module, _KEY, None)


class _Hook:
    """What hangs on a loss module. Does not keep the session alive."""

    __name__ = "hook"  # torch.jit.script asks

    def __init__(self, owner: LossModules) -> None:
        self._owner = ref(owner)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        owner = self._owner()
        if owner is not None:
            owner.called(module, args, kwargs)


def _loss_modules(model: nn.Module | None) -> Iterator[nn.Module]:
    """Those of the model, and all that the garbage collector knows."""
    parts = [] if model is None else list(model.modules())  # the collector does not know what gc.freeze() hid
    # Not isinstance: that may run code of objects that are none of our business.
    found = (o for o in (*parts, *gc.get_referrers(*_classes())) if issubclass(type(o), KINDS))
    return (module for module in found if "_forward_hooks" in module.__dict__)  # else it is just being made


def _classes() -> set[type]:
    """Those of torch's, and all that are made from them."""
    found: set[type] = set()
    queue: list[type] = list(KINDS)
    while queue:
        cls = queue.pop()
        if cls not in found:
            found.add(cls)
            queue += type.__subclasses__(cls)
    return found
