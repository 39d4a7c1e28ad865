"""The graphs that Dynamo has compiled: which a model has, how they are dropped, and the guards that we add to them.

Dynamo keeps graphs by code, and one that was traced over modules without hooks does not ask for any: it would serve
watched modules of the same class, unseen. So it gets a guard more for each module whose class is watched: that our mark
is not on it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FrameType
from typing import Any
from weakref import ReferenceType, WeakMethod, WeakSet

from torch import nn

from torchprobe.capture.compiled.private_names import find
from torchprobe.messages import log as _log
from torchprobe.naming import all_modules

# ---- what is compiled


def in_compiled_call() -> bool:
    """Whether a callable that `torch.compile` returned is among the callers."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _is_compiled(frame.f_code, frame.f_globals):
        frame = frame.f_back
    return frame is not None


def _is_compiled(code: CodeType, names: Mapping[str, Any]) -> bool:
    """In older torch it has a name that what is kept from being compiled has, too, which holds no compiler."""
    named = code.co_name == "compile_wrapper" or (code.co_name == "_fn" and "callback" in code.co_freevars)
    return named and names.get("__name__") == "torch._dynamo.eval_frame"


def hides_hooks(module: nn.Module) -> bool:
    """Whether `torch.compile` returned this module and traces the inner one's hooks, as it does for torch's own."""
    if type(module).__name__ != "OptimizedModule":
        return False
    compiled = getattr(module.forward, "_torchdynamo_orig_callable", None)
    return getattr(compiled, "__self__", None) is not module._orig_mod


def has_compiled_part(model: nn.Module) -> bool:
    """Whether a module of the model says that it is compiled. Costs 0.2 µs a module."""
    for _, module in all_modules(model):
        own = module.__dict__
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            return True
        if "forward" in own and hasattr(own["forward"], "_torchdynamo_orig_callable"):
            return True
    return False


def is_torchs_own(model: nn.Module) -> bool:
    """Whether a class of torch's says what calling the model does: torch.compile then traces the call, with hooks."""
    return (type(model).forward.__module__ or "").startswith("torch.nn.")  # a traced one has none


def is_wrapped(model: nn.Module) -> bool:
    """Whether something that `torch.compile` made of this very model is alive. Looks at all objects: 50 ms."""
    kind = find("torch._dynamo.eval_frame:OptimizedModule") if "torch._dynamo" in sys.modules else None
    return kind is not None and any(
        issubclass(type(found), kind) and found._modules.get("_orig_mod") is model for found in gc.get_objects()
    )


# ---- graphs, by code


def compiled_codes(model: nn.Module) -> set[CodeType]:
    """The code of the model's modules that Dynamo holds graphs of. Costs a microsecond for each class of module."""
    return _with_graphs(set(_codes(model))) if "torch._dynamo" in sys.modules else set()


def all_compiled_codes() -> set[CodeType]:
    """The code of every frame that Dynamo holds graphs of."""
    seen = find("torch._dynamo.convert_frame:input_codes") if "torch._dynamo" in sys.modules else None
    codes = [] if seen is None else [weak() for weak in seen.seen]
    return _with_graphs({code for code in codes if code is not None})


def drop(codes: set[CodeType]) -> None:
    """Forget the graphs of this code: its next call is traced anew."""
    reset = find("torch._C:_dynamo.eval_frame.reset_code")
    for code in codes if reset is not None else ():
        reset(code)


def _with_graphs(codes: set[CodeType]) -> set[CodeType]:
    entries = find("torch._C:_dynamo.eval_frame._debug_get_cache_entry_list") if codes else None
    return set() if entries is None else {code for code in codes if entries(code)}


def _codes(model: nn.Module) -> Iterator[CodeType]:
    for _, module in all_modules(model):
        for function in (module.forward, getattr(type(module), "forward", None), module._compiled_call_impl):
            function = getattr(function, "_torchdynamo_orig_callable", function)
            code = getattr(getattr(function, "__func__", function), "__code__", None)
            if isinstance(code, CodeType):
                yield code
    if is_torchs_own(model):
        around = find("torch._dynamo.external_utils:wrap_inline")
        yield from (c for c in (() if around is None else around.__code__.co_consts) if isinstance(c, CodeType))


# ---- guards


class Hearing:
    """Hears of each frame that Dynamo compiles, from when it is loaded on; at other times it costs nothing."""

    def __init__(self) -> None:
        self._handle: Any = None
        _waiting.add(self)
        self.attach()

    def compiled(self, code: CodeType) -> None:
        """Dynamo has traced a frame of this code, and will now make its guards."""

    def attach(self) -> bool:
        """Have Dynamo tell of graphs, if it is loaded by now: whether it is just now."""
        if self not in _waiting or "torch._dynamo" not in sys.modules:
            return False
        _waiting.discard(self)
        register = find("torch._dynamo.convert_frame:register_bytecode_hook")
        if register is not None:
            compiled = WeakMethod(self.compiled)  # Dynamo's list of hooks keeps no session alive
            self._handle = register(lambda code, new_code: _call(compiled, code))
        return True

    def detach(self) -> None:
        """Later graphs are left as they are. Safe to call twice."""
        _waiting.discard(self)
        if self._handle is not None:
            self._handle.remove()


class GraphGuards(Hearing):
    """Adds the guards to graphs while they are compiled."""

    def __init__(self, model: ReferenceType[nn.Module], marks: Mapping[str, Callable[..., Any]]) -> None:
        """marks: keys in the `__dict__` of watched modules, each with the forward hook that goes with it."""
        self.unguarded: set[CodeType] = set()
        """The code of graphs that were compiled while hooks were off, and may serve any module."""
        self.earlier: set[CodeType] = set()
        """The code of graphs that were there before."""
        self._model = model
        self._marks = marks
        self._failed = False
        super().__init__()

    @property
    def watching(self) -> bool:
        """Whether a graph would have our hooks if it were compiled now."""
        return next(self.watched(), None) is not None

    def watched(self) -> Iterator[tuple[nn.Module, str]]:
        """Modules that have a hook, each with its mark."""
        model = self._model()
        for module in () if model is None else model.modules():
            for mark, hook in self._marks.items():
                if mark in vars(module) and hook in module._forward_hooks.values():
                    yield module, mark

    def attach(self) -> bool:
        """The same; graphs that there are by now have no guards of ours."""
        new = super().attach()
        if new:
            self.earlier = all_compiled_codes()
            self.unguarded |= self.earlier
        return new

    def compiled(self, code: CodeType) -> None:
        """Its guards are about to be made."""
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
        watched, graph = {(type(module), mark) for module, mark in self.watched()}, account_of_trace()
        if not watched or graph is None:
            return False
        absent = find("torch._dynamo.guards:GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT")
        for source, module in list(_called_without_hooks(graph)) if absent is not None else ():
            for mark in self._marks:
                if (type(module), mark) in watched and mark not in vars(module):
                    graph.guards.add(source.make_guard(partial(absent, attr=mark)))
        return True


_waiting: WeakSet[Hearing] = WeakSet()  # those whose session began before Dynamo was loaded


def attach_guards() -> None:
    """A graph is being traced, perhaps the first."""
    for hearing in list(_waiting):
        hearing.attach()


def _call(method: Callable[[], Callable[[CodeType], None] | None], code: CodeType) -> None:
    found = method()
    if found is not None:
        found(code)


def account_of_trace() -> Any:
    """In a hook, Dynamo's account of the frame that it compiles, which it does not hand to its hooks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch._dynamo.convert_frame":
            found = frame.f_locals.get("output") or getattr(frame.f_locals.get("tracer_output"), "output_graph", None)
            if found is not None:
                return found
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
