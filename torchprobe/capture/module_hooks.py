"""What hangs on the user's modules: marks, shared hooks, and those of watchers in a sampled pass.

A pickle of a watched module is that of the module itself: the state that `copy` and `pickle` ask it for is without our
marks and hooks, so that it loads where torchprobe is not installed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import nn

from torchprobe.capture.compat import REPLICA, no_torch_function, plain_state
from torchprobe.capture.compiled.graphs import has_compiled_part, in_compiled_call
from torchprobe.capture.gate import no_graph
from torchprobe.capture.source import Pass, Running
from torchprobe.naming import Modules
from torchprobe.probes.base import Reporter

ROOT_KEY = "_torchprobe_root"  # key in the model's __dict__; the copy of a model finds None there
_STATE = "__getstate__"
_PREFIX = "_torchprobe"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
_OF_HOOKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_keys: set[str] = set()  # of all marks that were ever made
_numbers = itertools.count(-1, -1)  # those of torch's handles are positive


class Inert:
    """Means nothing to anybody else: copies and pickles become None."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())


def mark(module: nn.Module, key: str, value: Any) -> None:
    """Put something of ours under a key that begins with `_torchprobe` into a module's `__dict__`."""
    attributes = module.__dict__
    attributes[key] = value
    _keys.add(key)
    if _STATE not in attributes:
        attributes[_STATE] = CleanState(module)


def unmark(module: nn.Module, key: str) -> None:
    """Take it off."""
    own = module.__dict__
    own.pop(key, None)
    if own.keys().isdisjoint(_keys) and isinstance(own.get(_STATE), CleanState):
        del own[_STATE]


class SharedHook:
    """A function on many modules, under one number: a handle for each, as torch makes them, takes ten times as long."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._number = next(_numbers)

    def put_before(self, module: nn.Module) -> None:
        """`module.register_forward_pre_hook(function, with_kwargs=True)`."""
        module._forward_pre_hooks[self._number] = self._function
        module._forward_pre_hooks_with_kwargs[self._number] = True

    def put_after(self, module: nn.Module) -> None:
        """`module.register_forward_hook(function)`; on the root ahead of the one that is there, which ends its pass."""
        hooks: Any = module._forward_hooks
        hooks[self._number] = self._function
        if ROOT_KEY in module.__dict__:
            hooks.move_to_end(self._number, last=False)

    def take_off(self, module: nn.Module) -> None:
        """Safe to call twice."""
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
            hooks.pop(self._number, None)


class CleanState:
    """A module's own `__getstate__`, without what is ours."""

    def __init__(self, module: nn.Module) -> None:
        self._module: ReferenceType[nn.Module] = ref(module)

    def __call__(self) -> Any:
        """The state of the module as if it were not watched."""
        module = self._module()
        if module is None:
            return None
        own: Callable[[Any], Any] | None = getattr(type(module), _STATE, None)
        state = module.__dict__.copy() if own is None else own(module)
        return _cleaned(state) if isinstance(state, dict) else state


def _cleaned(state: dict[str, Any]) -> dict[str, Any]:
    clean = {
        key: value
        for key, value in state.items()
        if not (isinstance(key, str) and key.startswith(_PREFIX)) and not isinstance(value, CleanState)
    }
    for name in _HOOKS:
        hooks = clean.get(name)
        if isinstance(hooks, OrderedDict) and any(map(_is_ours, hooks.values())):
            clean[name] = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_ours(hook))
            ours = [key for key, hook in hooks.items() if _is_ours(hook)]
            for other in _OF_HOOKS:
                if isinstance(clean.get(other), OrderedDict) and other.startswith(name):
                    clean[other] = OrderedDict((k, v) for k, v in clean[other].items() if k not in ours)
    return clean


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torchprobe.")


# ---- hooks on chosen modules for sampled passes of eager models: on before such a pass, and off after it

MARKS = "_torchprobe_watchers"  # key in a module's __dict__; the copy of a model finds None there

_COMPILED = "the model is compiled, and this is not watched inside a graph"


class Watcher(Protocol):
    """What looks at module calls of a sampled pass, in training or in validation too. Exceptions end at its gate."""

    reporter: Reporter
    in_validation: bool

    def chosen(self, modules: Modules) -> Iterable[tuple[str, nn.Module]]:
        """Which of the model's modules."""

    def before(
        self, passing: Pass, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A chosen module is called; inside backward when activation checkpointing calls it again."""

    def after(self, passing: Pass, name: str, output: Any) -> None:
        """It has returned."""

    def unseen(self, reason: str) -> None:
        """There will be no calls to see."""


class Marks(Inert):
    """The watchers of a module, each with the name it knows it by."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.watchers: list[tuple[Watcher, str]] = []


class EagerHooks:
    """The hooks of all watchers. Modules that are compiled are left alone: hooks would become part of their graphs."""

    def __init__(self, model: ReferenceType[nn.Module], watchers: Sequence[Watcher], running: Running) -> None:
        self._model = model
        self._watchers = watchers
        self._running = running
        self._marked: list[ReferenceType[nn.Module]] = []
        self._armed: list[Watcher] = []
        self._size: list[tuple[str, int]] = []
        self._compiled = False

    def arm(self, due: frozenset[Reporter], training: bool, modules: Modules) -> None:
        """Put hooks on for the watchers that sample the coming pass, and off for others. modules: of the model."""
        wanted = [w for w in self._watchers if w.reporter in due and (training or w.in_validation)]
        model = self._model()
        if model is not None and wanted and self._is_compiled(model):
            for watcher in wanted:
                watcher.unseen(_COMPILED)
            wanted = []
        size = [(name, id(module)) for name, module in modules]
        if model is None or (wanted == self._armed and (not wanted or size == self._size)):
            return
        if self._running.compiled and self._armed:  # they were traced, and taking them off would compile again
            return
        self.disarm()
        for watcher in wanted:
            for name, module in watcher.chosen(modules):
                self._put_on(module, watcher, name)
        self._armed, self._size = wanted, size

    def disarm(self) -> None:
        """Take hooks and marks off. Safe to call twice."""
        for weak in self._marked:
            if (module := weak()) is not None:
                _BEFORE.take_off(module)
                _AFTER.take_off(module)
                unmark(module, MARKS)
        self._marked.clear()
        self._armed = []

    def _is_compiled(self, model: nn.Module) -> bool:
        """Once it was, it is: a function around the model is known by its first traced hook only."""
        self._compiled = self._compiled or self._running.compiled or has_compiled_part(model) or in_compiled_call()
        return self._compiled

    def _put_on(self, module: nn.Module, watcher: Watcher, name: str) -> None:
        if module.__dict__.get(MARKS) is None:
            self._marked.append(ReferenceType(module))
            mark(module, MARKS, Marks(self._running))
            _BEFORE.put_before(module)
            _AFTER.put_after(module)
        module.__dict__[MARKS].watchers.append((watcher, name))


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Tell the watchers of a module that it is called."""
    marks = None if REPLICA in module.__dict__ else module.__dict__.get(MARKS)
    if kwargs is None:  # taken off by a hook that ran before it in this very call, which torch calls the plain way then
        return
    if marks is not None and not torch.compiler.is_compiling():
        with marks.running.meter:
            _tell(marks, "before", module, args, kwargs or {})


def _after(module: nn.Module, args: Any, output: Any) -> None:
    marks = None if REPLICA in module.__dict__ else module.__dict__.get(MARKS)
    if marks is not None and not torch.compiler.is_compiling():
        with marks.running.meter:
            _tell(marks, "after", output)


_BEFORE, _AFTER = SharedHook(before), SharedHook(_after)


def _tell(marks: Marks, what: str, *arguments: Any) -> None:
    """Call this method of all watchers that are due."""
    current, tracing, transform = plain_state()
    if tracing() or transform() is not None:
        return
    passing = marks.running.of_backward() if current() != -1 else marks.running.forward()
    if passing is None:
        return
    with no_torch_function(), no_graph():
        for watcher, name in marks.watchers:
            gate = watcher.reporter.gate
            if watcher.reporter in passing.due and not gate.failed:
                try:
                    getattr(watcher, what)(passing, name, *arguments)
                except Exception as error:
                    gate.fail(error)
