"""Hooks on chosen modules for sampled passes of eager models: on before such a pass, and off after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol
from weakref import ReferenceType

import torch
from torch import nn

from torchprobe.capture.compat import REPLICA, no_torch_function, plain_state
from torchprobe.capture.compiled.graphs import has_compiled_part, in_compiled_call
from torchprobe.capture.gate import no_graph
from torchprobe.capture.marks import Inert, SharedHook, mark, unmark
from torchprobe.capture.source import Pass, Running
from torchprobe.naming import Modules
from torchprobe.probes.base import Reporter

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
