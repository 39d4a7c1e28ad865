"""Modules of the classes of watched ones: graphs that were traced over the one kind must not serve the other.

Dynamo keeps graphs by code, and one that was traced over modules without hooks does not ask for any. So it gets a guard
more for each module whose class is watched: that our mark is not on it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FrameType
from typing import Any
from weakref import ReferenceType, WeakMethod

from torch import nn

_log = logging.getLogger("torchprobe")


class Lookalikes:
    """Adds the guards to graphs while they are compiled; at other times it costs nothing."""

    def __init__(self, model: ReferenceType[nn.Module], marks: Mapping[str, Callable[..., Any]]) -> None:
        """marks: keys in the `__dict__` of watched modules, each with the forward hook that goes with it."""
        from torch._dynamo.convert_frame import register_bytecode_hook

        self.unguarded: set[CodeType] = set()
        """The code of graphs that were compiled while hooks were off, and may serve any module."""
        self._model = model
        self._marks = marks
        self._failed = False
        compiled = WeakMethod(self._compiled)  # Dynamo's list of hooks keeps no session alive
        self._handle = register_bytecode_hook(lambda code, new_code: _call(compiled, code))

    @property
    def watching(self) -> bool:
        """Whether a graph would have our hooks if it were compiled now."""
        return next(self._watched(), None) is not None

    def detach(self) -> None:
        """Later graphs are left as they are. Safe to call twice."""
        self._handle.remove()

    def _compiled(self, code: CodeType) -> None:
        """Dynamo has traced a frame of this code, and will now make its guards."""
        guarded = False
        try:
            guarded = not self._failed and self._guard()
        except Exception:  # the compiler must not hear of it
            self._failed = True
            _log.exception("compiled graphs are not guarded, and may serve watched modules too; training goes on")
        if not guarded:
            self.unguarded.add(code)

    def _guard(self) -> bool:
        """Whether there is something to guard the graph that is made now against."""
        watched, graph = set(self._watched()), _traced_graph()
        if not watched or graph is None:
            return False
        for source, module in list(_called_without_hooks(graph)):
            for mark in self._marks:
                if (type(module), mark) in watched and mark not in vars(module):
                    graph.guards.add(source.make_guard(_absence_of(mark)))
        return True

    def _watched(self) -> Iterator[tuple[type[nn.Module], str]]:
        """Classes of modules that have a hook, each with its mark."""
        model = self._model()
        for module in () if model is None else model.modules():
            for mark, hook in self._marks.items():
                if mark in vars(module) and hook in module._forward_hooks.values():
                    yield type(module), mark


def _call(method: Callable[[], Callable[[CodeType], None] | None], code: CodeType) -> None:
    found = method()
    if found is not None:
        found(code)


def _traced_graph() -> Any:
    """Dynamo's account of the frame that it compiles, which it does not hand to its hooks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch._dynamo.convert_frame" and "output" in frame.f_locals:
            return frame.f_locals["output"]
        frame = frame.f_back
    return None


def _called_without_hooks(graph: Any) -> Iterator[tuple[Any, nn.Module]]:
    """Modules that the graph calls and that had no hooks, each with the source by which guards find it."""
    scope = {"L": graph.local_scope, "G": graph.global_scope}
    for guard in graph.guards:
        source = guard.originating_source
        if guard.inner_create_fn().__name__ == "EMPTY_NN_MODULE_HOOKS_DICT" and source.member == "_forward_hooks":
            module = _value(guard.name.removesuffix("._forward_hooks"), scope)
            if isinstance(module, nn.Module):
                yield source.base, module


def _value(name: str, scope: dict[str, Any]) -> Any:
    """What Dynamo's name for a source means, an expression; None for one that uses Dynamo's own functions."""
    try:
        return eval(name, scope)
    except Exception:
        return None


def _absence_of(mark: str) -> Any:
    from torch._dynamo.guards import GuardBuilder

    return partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=mark)
