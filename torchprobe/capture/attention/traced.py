"""Attention inside compiled graphs: a function mode that exists while a module is traced, and an operator in its place.

Hooks on every module of the user's own push a mode when the module is called and take it off after; the innermost one
tells whose attention it is. Dynamo traces the push, the mode and the operator into the graph of sampled steps, and
nothing of it into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.attention import dot_product, multi_head, stack
from torchprobe.capture.attention.layout import unusual
from torchprobe.capture.attention.observer import Call, Observer
from torchprobe.capture.attention.owner import Caller, heads_of
from torchprobe.capture.attention.projected import projected
from torchprobe.capture.attention.uncovered import unknown_shapes
from torchprobe.capture.compat import pop_mode as _pop_mode
from torchprobe.capture.compat import push_mode as _push_mode
from torchprobe.capture.compat import skip_frames as keep_out
from torchprobe.capture.compiled import operators as opaque
from torchprobe.capture.compiled.tracing import beside, enter_nesting, leave_nesting, place, run_in, scope
from torchprobe.capture.inert import Inert
from torchprobe.capture.sites import Pass, note_compiled
from torchprobe.naming import named_modules

OWNER = "_torchprobe_attention"  # key in a module's __dict__; the copy of a model finds None there

_DOT_PRODUCT = dot_product.FUNCTIONS[0]


class Owner(Inert):
    """A module that may compute attention, as the hooks find it."""

    def __init__(self, name: str, module: nn.Module, current: Pass, observer: Observer) -> None:
        self.current = current
        self.handle = opaque.handle(self)
        self.mode = TracedMode(self.handle)
        self._name = name
        self._heads = heads_of(module)
        self._observer = observer

    def record_call(
        self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None, added: int, place: int
    ) -> None:
        """A compiled graph has computed an attention. added: keys at the end that are no tokens."""
        if self._observer.gate.failed or not self._observer.gate.train:
            return
        with self._observer.guard():
            call = {"query": query, "key": key, "attn_mask": mask, "is_causal": causal, "scale": scale}
            self._record(call, added, place)

    def _record(self, call: dict[str, Any], added: int, place: int) -> None:
        reason = unusual(call["query"], call["key"], call["attn_mask"])
        if reason is not None:
            self._observer.uncovered.add(reason)
            return
        try:
            source = dot_product.query_key(call, self._heads)
        except ValueError:
            self._observer.uncovered.add(unknown_shapes(self._name))
            return
        batch, _, queries, keys = source.shape
        tokens = keys - added
        of = Call(Caller(self._name, (("compiled", "", place),), self._heads), queries != tokens)
        mask = None if source.mask is None else source.mask[..., :tokens]
        padding = self._observer.padding(of, mask, queries, tokens, batch)
        self._observer.record_source(replace(of, padding=padding), source, training=True)


class TracedMode(TorchFunctionMode):
    """Adds an operator to the graph after each dot product. Does nothing where nothing is traced.

    Modes of the modules around the owner see the same call: `nesting` tells the innermost.
    """

    def __init__(self, handle: Tensor) -> None:
        self._handle = handle

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and record it where it is a dot product."""
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func is not _DOT_PRODUCT and func is not multi_head.FUNCTION:
            return stack.call(func, args, kwargs)
        innermost = enter_nesting()
        result = func(*args, **kwargs)
        leave_nesting()
        if innermost and func is _DOT_PRODUCT:
            _record(self._handle, *args, **kwargs)
        elif innermost:
            _record_multi_head(self._handle, *args, **kwargs)
        return result


def _record(
    handle: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    with torch.no_grad():
        mask = None if attn_mask is None else attn_mask.detach()
        opaque.attention(handle, query.detach(), key.detach(), mask, is_causal, scale, 0, place())


def _record_multi_head(handle: Tensor, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        query, key, mask, added = projected(*args, **kwargs)
        opaque.attention(handle, query, key, mask, False, None, added, place())


def put_mode_on(module: nn.Module, args: Any) -> None:
    """The forward pre-hook."""
    owner = module.__dict__.get(OWNER)
    if owner is None:
        return
    sampled = owner.current.training and owner.current.sampled
    if torch.compiler.is_compiling():
        where = scope()
        if where != "elsewhere":
            run_in(where, note_compiled, owner.current)
            if sampled:
                run_in(where, _push_mode, owner.mode)
    elif sampled:
        owner.current.fired = True
        beside(stack.push, owner.mode)


def take_mode_off(module: nn.Module, args: Any, output: Any) -> None:
    """The forward hook."""
    owner = module.__dict__.get(OWNER)
    if owner is None or not (owner.current.training and owner.current.sampled):
        return
    if not torch.compiler.is_compiling():
        beside(stack.remove, owner.mode)
        return
    where = scope()
    if where != "elsewhere":
        run_in(where, _pop_mode)


class TracedAttention:
    """The hooks by which attention is found inside compiled graphs, on every module whose code may compute it."""

    def __init__(self, model: ReferenceType[nn.Module], observer: Observer, current: Pass) -> None:
        self._model = model
        self._observer = observer
        self._current = current
        self._handles: list[RemovableHandle] = []
        self._owners: WeakKeyDictionary[nn.Module, Owner] = WeakKeyDictionary()
        keep_out(put_mode_on, take_mode_off)

    def arm(self) -> None:
        """A step to sample begins."""
        model = self._model()
        if model is None or self._handles:
            return
        for name, module in named_modules(model):
            if _may_own(module):
                self._hook(name, module)

    def disarm(self) -> None:
        """Take the hooks off, unless a compiled graph holds them."""
        if not self._current.compiled:
            self._remove()

    def detach(self) -> None:
        """Take everything off."""
        self._remove()
        for module in list(self._owners):
            module.__dict__.pop(OWNER, None)
        self._owners.clear()

    def interrupted(self) -> None:
        """A forward pass has ended, perhaps by an exception: nothing stays entered."""
        for owner in self._owners.values():
            stack.remove(owner.mode)

    def _hook(self, name: str, module: nn.Module) -> None:
        if module not in self._owners:
            self._owners[module] = Owner(name, module, self._current, self._observer)
        module.__dict__[OWNER] = self._owners[module]
        self._handles += [module.register_forward_pre_hook(put_mode_on), module.register_forward_hook(take_mode_off)]

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _may_own(module: nn.Module) -> bool:
    """Whether a module's own code may compute attention, by its names.

    Tracing under a mode is not what Dynamo does best, so that it is kept to where it is needed.
    """
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        return isinstance(module, nn.MultiheadAttention)
    return "att" in kind.__name__.lower() or any(_says(name) for name in _names_in(kind))


def _says(name: str) -> bool:
    return any(word in name for word in ("scaled_dot_product", "sdpa", "attention_interface"))


def _names_in(kind: type) -> Iterator[str]:
    """Names that a class's own methods use."""
    for member in vars(kind).values():
        code = getattr(member, "__code__", None)
        if code is not None:
            yield from code.co_names
