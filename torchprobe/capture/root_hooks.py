"""Forward passes of the whole model: two hooks at its root, alone on an idle step; and weights loaded into it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from types import FrameType
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from torchprobe.capture import compat
from torchprobe.capture.compiled.graphs import hides_hooks
from torchprobe.capture.compiled.tracing import scope
from torchprobe.capture.gate import Guard, protected
from torchprobe.capture.module_hooks import MARKS, ROOT_KEY, Inert, before, mark, unmark
from torchprobe.capture.modules import hookable
from torchprobe.capture.pipelining import PIPELINING, learning_shapes
from torchprobe.capture.source import Running, uncounted
from torchprobe.messages import log as _log
from torchprobe.naming import ROOT, unwrapped

_LOADS = "_torchprobe_loads"
_CALLS = "_torchprobe_calls"
_MOST_PARTS = 64  # that begin steps when they are called by themselves
_FORWARD_OF_A_BASE_CLASS = frozenset({"pytorch_lightning.core.module", "lightning.pytorch.core.module"})


class PassObserver(Protocol):
    """Hears of each forward pass that is not traced into a compiled graph."""

    guard: Guard

    def enter_pass(self, module: nn.Module, grad_enabled: bool) -> None:
        """A forward pass of the model begins."""

    def leave_pass(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """It ended without an exception."""

    def raise_pass(self) -> None:
        """It ended by an exception."""

    def leave_recomputation(self, output: Any) -> None:
        """It was run again, inside a backward pass."""

    def leave_part(self, output: Any) -> None:
        """A part in training mode was called, which has begun a step before, by itself or in a pass."""


class Root(Inert):
    """What the root hooks find on the model, or on a part, whose calls are passes where no other one runs."""

    def __init__(self, observer: PassObserver, running: Running, of_part: bool = False) -> None:
        self.guard = observer.guard
        self.observer = observer
        self.running = running
        self.error: BaseException | None = None  # that is handled while the pass runs
        self._plain = False  # the call that began last is a forward pass
        self._in_backward, self._tracing, self._transform = compat.plain_state()
        self.learning = False  # whether the pass is for shapes alone: of a pipeline's stage, or on meta tensors
        self._told = False
        self._of_part = of_part
        self._depth = 0  # calls of a part that run, one inside of the other
        self._alone = False  # the outermost is a pass

    @protected
    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None, grad_enabled: bool) -> None:
        """The model is called."""
        if self._of_part:
            self._depth += 1
            if self._depth > 1 or self.running.passing is not None:
                return
            self._alone = True
        self.error = sys.exc_info()[1]
        self.learning = PIPELINING in sys.modules and _learns_shapes()
        for x in args:
            if isinstance(x, Tensor) and x.is_meta:
                self.learning = True
        self._plain = self._in_backward() == -1 and not self._tracing() and self._transform() is None
        if self.learning:
            self.running.enter(uncounted())
        elif self._plain:
            in_training = grad_enabled or (module.training and compat.in_reentrant_checkpoint())
            marks = module.__dict__.get(MARKS)
            self.observer.enter_pass(module, in_training)
            if module.__dict__.get(MARKS) is not marks:  # put on now, too late for what runs before this call
                before(module, args, kwargs or {})
        elif not self._told and compat.under_function_transform():
            self._told = True
            _log.warning("forward passes under torch.func transforms are not recorded; the model runs as ever")

    @protected
    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """It has returned, or raised: then there is no output."""
        if self._of_part:
            self._depth -= self._depth > 0  # the hooks may have come in mid-call
            if self._depth or not self._alone:
                return
            self._alone = False
        error, self.error = self.error, None
        if self.learning:
            self.running.leave()
        elif not self._plain and (compat.in_backward() or compat.under_transform()):
            if compat.in_backward() and not compat.under_transform():
                self.observer.leave_recomputation(output)
        elif output is None and sys.exc_info()[1] is not error:
            self.observer.raise_pass()
        else:
            self.observer.leave_pass(module, args, kwargs, output)


def _learns_shapes() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code not in learning_shapes():
        frame = frame.f_back
    return frame is not None


def enter(module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
    """The model is called; or it was instrumented in that call, before its `forward`: then this pass counts, too."""
    root = module.__dict__.get(ROOT_KEY)
    if root is None:
        return
    if not torch.compiler.is_compiling():
        if compat.REPLICA not in module.__dict__:
            root.enter(module, args, kwargs, torch.is_grad_enabled())
    elif scope() == "graph":  # only plain flags: a call out of the graph would break it
        root.running.enter_graph(module.training and torch.is_grad_enabled())


def _leave(module: nn.Module, args: Any, *called: Any) -> None:
    root = module.__dict__.get(ROOT_KEY)  # None where another hook of this call took it off: torch gives no kwargs then
    if root is not None and not torch.compiler.is_compiling() and compat.REPLICA not in module.__dict__:
        root.leave(module, args, *called)


class Listener(Inert):
    """What is found on the model before weights are loaded into it, and on a part when it has run."""

    def __init__(self, guard: Guard, hear: Callable[..., None]) -> None:
        self.guard = guard
        self._hear = hear

    @protected
    def tell(self, *what: Any) -> None:
        """It is time."""
        self._hear(*what)


def _load(module: nn.Module, *_: Any) -> None:
    loads = module.__dict__.get(_LOADS)
    if loads is not None:
        loads.tell()


def _leave_part(module: nn.Module, _: Any, output: Any) -> None:
    calls = None if torch.compiler.is_compiling() else module.__dict__.get(_CALLS)
    if calls is not None and module.training and compat.REPLICA not in module.__dict__:
        calls.tell(output)


class PassHooks:
    """The root hooks: on the model, or on its parts when only these are ever called.

    before_load: called before a state is loaded into the model.
    """

    def __init__(
        self, model: nn.Module, observer: PassObserver, running: Running, before_load: Callable[[], None]
    ) -> None:
        self._observer = observer
        self._running = running
        self._handles: list[RemovableHandle] = []
        self._modules: WeakIdKeyDictionary = WeakIdKeyDictionary()
        compat.skip_frames(enter, _leave, _leave_part)
        self._put_on(list(_roots(model)))
        own = unwrapped(model)  # which any of its wrappers loads, too
        mark(own, _LOADS, Listener(observer.guard, before_load))
        self._loads = ref(own)
        self._handles.append(own.register_load_state_dict_pre_hook(_load))

    def hear_part(self, module: nn.Module | None) -> bool:
        """Hear of a part's calls at all steps: it was called by itself, which began one. Whether it is new."""
        new = module is not None and _CALLS not in module.__dict__ and len(self._modules) < _MOST_PARTS
        if module is not None and new:
            mark(module, _CALLS, Listener(self._observer.guard, self._observer.leave_part))
            self._handles.append(module.register_forward_hook(_leave_part))
            self._modules[module] = None
        return new

    def follow_parts(self) -> bool:
        """Calls of parts by the model's own methods are passes from now on. Whether they were none before."""
        model = self._loads()
        entries = [(ROOT, entry) for entry in islice(() if model is None else _entries(model), _MOST_PARTS)]
        fresh = [entry for _, entry, as_it_is in hookable(entries) if as_it_is and ROOT_KEY not in entry.__dict__]
        self._put_on(fresh, of_parts=True)
        return bool(fresh)

    def remove(self) -> None:
        """Take hooks and state off. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        for module in list(self._modules):
            unmark(module, ROOT_KEY)
            unmark(module, _CALLS)
        self._modules.clear()
        if (own := self._loads()) is not None:
            unmark(own, _LOADS)

    def _put_on(self, modules: list[nn.Module], of_parts: bool = False) -> None:
        for module in modules:
            mark(module, ROOT_KEY, Root(self._observer, self._running, of_parts))
            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(_leave, with_kwargs=True, always_call=True),
            ]
            self._modules[module] = None


def _roots(model: nn.Module) -> Iterator[nn.Module]:
    """What is called: the model, or what torch.compile made of it too, when hooks inside are part of the graph."""
    if _has_forward(model):
        yield model
        return
    if hides_hooks(model):
        yield model
    yield from _entries(model)


def _has_forward(module: nn.Module) -> bool:
    """Whether the module's class says what calling it does; Lightning's base class only seems to."""
    forward = getattr(type(module), "forward", None)  # a class of torch.jit's does not show its own
    home = getattr(forward, "__module__", None)
    return forward is not nn.Module.forward and home not in _FORWARD_OF_A_BASE_CLASS


def _entries(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, torch.jit.ScriptModule):  # it takes no hooks
            continue
        if _has_forward(child):
            yield child
        else:
            yield from _entries(child)
