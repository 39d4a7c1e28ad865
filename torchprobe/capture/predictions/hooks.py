"""Hooks that tell of predictions: on parts of the model, members of ensembles inside of it, and loss modules."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.compat import in_backward, under_transform
from torchprobe.capture.compiled.graphs import has_compiled_part, in_compiled_call
from torchprobe.capture.module_hooks import ROOT_KEY, mark, unmark
from torchprobe.capture.modules import hookable
from torchprobe.capture.predictions.inputs import InputKey
from torchprobe.capture.predictions.targets import KINDS
from torchprobe.naming import ROOT, all_modules, named_modules

# ---- outputs of the model's parts

OnOutput = Callable[[str, nn.Module, Sequence[Any], Mapping[str, Any], Any], None]
Protect = Callable[[Any], AbstractContextManager[None]]


class Site(NamedTuple):
    """A module that gets a hook: as a part that was chosen, or as a member of an ensemble."""

    module: ReferenceType[nn.Module]
    name: str
    number: int | None  # of the member


class Parts:
    """Hooks on parts of the model, on between the start and the end of a sampled pass.

    modules: patterns of the names of modules to read. on_output: called with the output of each such one. protected:
    the boundary around what is done with an output. What may be an ensemble are two or more modules of one class in an
    `nn.ModuleList`, called with the same input.
    """

    def __init__(
        self, model: ReferenceType[nn.Module], modules: Sequence[str], on_output: OnOutput, protected: Protect
    ) -> None:
        self._model = model
        self._protected = protected
        self._modules = modules
        self._on_output = on_output
        self._sites: dict[bool, list[Site]] = {}  # in training, and in validation
        self._handles: list[RemovableHandle] = []
        self._calls: defaultdict[str, list[tuple[int, InputKey, bool, Any]]] = defaultdict(list)

    def arm(self, training: bool) -> None:
        """A sampled pass begins. Nothing inside a compiled model gets a hook: it would be compiled anew."""
        self.disarm()
        if training not in self._sites:
            self._sites[training] = list(self._find(training))
        if in_compiled_call():
            return
        for site in self._sites[training]:
            module = site.module()
            if module is not None and ROOT_KEY not in module.__dict__:  # else its own pass tells
                self._handles.append(module.register_forward_hook(partial(self._heard, site), with_kwargs=True))

    def look_again(self) -> None:
        """The model may be another one at the next pass. Looking costs microseconds a module."""
        self._sites.clear()

    def _find(self, training: bool) -> Iterator[Site]:
        model = self._model()
        kinds = () if model is None else {type(module) for _, module in all_modules(model)}
        if model is None or not (self._modules or any(issubclass(kind, nn.ModuleList) for kind in kinds)):
            return
        if has_compiled_part(model):
            return
        modules = list(hookable(named_modules(model)))
        may = {module for _, module, in_eval in modules if training or in_eval}
        for name, module, _ in modules:
            if module in may and name != ROOT and any(fnmatchcase(name, pattern) for pattern in self._modules):
                yield Site(ref(module), name, None)
            if _may_be_ensemble(module) and may.issuperset(module.children()):
                yield from (Site(ref(member), name, index) for index, member in enumerate(module.children()))

    def disarm(self) -> None:
        """The pass is over: hooks are off."""
        while self._handles:
            self._handles.pop().remove()

    def forget(self) -> None:
        """No output is kept."""
        self._calls.clear()

    def ensembles(self) -> Iterator[tuple[str, list[Any]]]:
        """Names of the ensembles that were called in this pass, and their members' outputs.

        Members that were called with different inputs are layers, or something else.
        """
        for name, calls in self._calls.items():
            numbers, _, same, outputs = zip(*calls, strict=True)
            if len(set(numbers)) == len(calls) > 1 and all(same):
                yield name, list(outputs)

    def _heard(self, site: Site, module: nn.Module, args: Any, *called: Any) -> None:
        taken_off = len(called) < 2  # by another hook of this call: then torch gives no kwargs
        if taken_off or torch.compiler.is_compiling() or under_transform() or in_backward():
            return
        kwargs, output = called
        if site.number is None:
            self._on_output(site.name, module, args, kwargs, output)
        else:
            with self._protected(output):
                key, calls = InputKey(args, kwargs), self._calls[site.name]
                same = not calls or key.same_as(calls[0][1])  # a trunk's output is gone when the model has returned
                calls.append((site.number, key, same, output))


def _may_be_ensemble(module: nn.Module) -> bool:
    """Members of one class with parameters of the same shapes."""
    members = list(module.children()) if isinstance(module, nn.ModuleList) else []  # a list may hold None, too
    kinds = {(type(member), tuple(p.shape for p in member.parameters())) for member in members}
    return len(members) > 1 and len(kinds) == 1 and bool(next(iter(kinds))[1])


# ---- calls of loss modules

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

    def __call__(self, module: nn.Module, args: Any, *called: Any) -> None:
        if torch.compiler.is_compiling():
            return
        owner = self._owner()
        if owner is not None and len(called) == 2:  # else another hook of this call took it off
            owner.called(module, args, called[0])


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
