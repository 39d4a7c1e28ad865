"""Whose call it is: the nearest module of the model among the callers."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary

from torch import nn

from torchprobe.naming import ROOT, named_modules

Path = tuple[tuple[str, str, int], ...]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_GRAPH_CALLERS = frozenset({"torch._functorch._aot_autograd.runtime_wrappers", "torch._functorch.aot_autograd"})
_READS_LOCALS = frozenset({"locals", "vars", "dir", "eval", "exec"})
_MODULE_CALL = nn.Module.__module__  # where modules are called, by one function or another


class Caller(NamedTuple):
    """Where an attention call comes from.

    name: of the module; path: the call sites between the module's own call and this one, which tell two attentions
    of a module apart; heads: how many the module says it has, where it says so.
    """

    name: str
    path: Path
    heads: int | None


INSIDE_GRAPH = Caller("", (), None)
"""The caller where a compiled graph runs its operations one by one: what they are was recorded while it was traced."""


class Owners:
    """The names of a model's modules, and the way from a frame to one of them."""

    def __init__(self, model: ReferenceType[nn.Module]) -> None:
        self._model = model
        self._names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._are_new = False

    def begin_pass(self) -> None:
        """Modules may have come and gone: look again, if one is met that has no name."""
        self._are_new = False

    def caller(self, beyond_graphs: bool = False) -> Caller | None:
        """Who is calling, as seen from the caller of this method; None outside the model's modules.

        A compiled graph that is running is nobody, `INSIDE_GRAPH`; beyond_graphs: whoever calls the graph.
        """
        frame: FrameType | None = sys._getframe(1)
        owner: nn.Module | None = None
        path = []
        while frame is not None:
            code = frame.f_code
            if owner is None:
                if not beyond_graphs and _is_graph(frame):
                    return INSIDE_GRAPH
                owner = self._module(frame)
            if owner is not None and frame.f_globals.get("__name__") == _MODULE_CALL:
                break
            if not _is_ours(frame):
                path.append((code.co_filename, code.co_name, frame.f_lasti))
            frame = frame.f_back
        return None if owner is None else Caller(self._names[owner], tuple(path), heads_of(owner))

    def _module(self, frame: FrameType) -> nn.Module | None:
        found = None if _is_ours(frame) else _self_of(frame)
        return found if isinstance(found, nn.Module) and self._is_named(found) else None

    def _is_named(self, module: nn.Module) -> bool:
        model = self._model()
        if module not in self._names and not self._are_new and model is not None:
            self._names = WeakKeyDictionary({module: name for name, module in named_modules(model)})
            self._are_new = True
        return module in self._names


def common_owner(one: str, other: str) -> str:
    """The innermost module that contains both: `blocks.0.attn` for `blocks.0.attn.qk` and `blocks.0.attn`."""
    if ROOT in (one, other):
        return ROOT
    shared = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared) or ROOT


def _is_graph(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith("<eval_with_key>") or frame.f_globals.get("__name__") in _GRAPH_CALLERS


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(__package__)


def _self_of(frame: FrameType) -> Any:
    """The `self` of a function, read without keeping the function's other locals alive."""
    code = frame.f_code
    if "self" not in code.co_varnames and "self" not in code.co_freevars:
        return None
    values = frame.f_locals
    found = values.get("self")
    if isinstance(values, dict) and code.co_flags & inspect.CO_OPTIMIZED and _READS_LOCALS.isdisjoint(code.co_names):
        values.clear()  # before Python 3.13 the frame keeps this snapshot, and so the user's logits, until it returns
    return found


def heads_of(module: nn.Module) -> int | None:
    """How many heads a module says it has."""
    found = (getattr(module, name, None) for name in _HEADS)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
