"""Attention inside compiled graphs: a function mode that exists while a module is traced, and an operator in its place.

Hooks on every module of the user's own push a mode when the module is called and take it off after; the innermost one
tells whose attention it is. Dynamo traces the push, the mode and the operator into the graph of sampled steps, and
nothing of it into the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from torchprobe.capture.attention import dot_product, multi_head, stack
from torchprobe.capture.attention.graph import look, new_number, plan_of
from torchprobe.capture.attention.layout import Arrangement, plain
from torchprobe.capture.attention.observer import SECOND_THREAD, Call, Observer
from torchprobe.capture.attention.sites import Caller, heads_of
from torchprobe.capture.compat import skip_frames
from torchprobe.capture.compiled import operators
from torchprobe.capture.compiled.tracing import beside, enter_nesting, is_torchs, leave_nesting, place, run_in, scope
from torchprobe.capture.frames import names_in
from torchprobe.capture.module_hooks import Inert, mark, unmark
from torchprobe.capture.sites import note_compiled
from torchprobe.capture.source import Running
from torchprobe.naming import Modules
from torchprobe.statistics.attention import Logits

OWNER = "_torchprobe_attention"  # key in a module's __dict__; the copy of a model finds None there

_DOT_PRODUCT = dot_product.FUNCTIONS[0]
_SAYS = ("scaled_dot_product", "sdpa", "attention_interface")  # names that a method uses which computes attention


class Owner(Inert):
    """A module that may compute attention, as the hooks find it."""

    def __init__(self, name: str, module: nn.Module, running: Running, observer: Observer, reads: bool) -> None:
        self.running = running
        self.handle = operators.handle(self)
        self.mode = TracedMode(self.handle, reads)
        self._name = name
        self._heads = heads_of(module)
        self._observer = observer

    def record_call(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        causal: bool,
        scale: float | None,
        added: int,
        place: int,
    ) -> None:
        """A compiled graph has computed an attention. padding: bool (batch, keys), where an argument says it; added:
        keys at the end that are no tokens."""
        observer = self._observer
        if observer.gate.failed or not observer.gate.train:
            return
        if observer.sites.are_elsewhere:
            observer.uncovered.add(SECOND_THREAD)
            return
        with observer.guard():
            call = {"query": query, "key": key, "attn_mask": mask, "is_causal": causal, "scale": scale}
            self._record(call, padding, added, place)
            observer.finish()

    def record_logits(self, logits: Tensor, number: int, place: int) -> None:
        """A compiled graph has computed a softmax, of an attention or not."""
        observer, plan = self._observer, plan_of(number)
        if plan is None or observer.gate.failed or not observer.gate.train:
            return
        if observer.sites.are_elsewhere:
            observer.uncovered.add(SECOND_THREAD)
        elif plan.arranged is None or plan.refused is not None:
            observer.uncovered.add(f"the attention of {self._name}, {plan.refused}")
            observer.sites.refuse(self._name, self._caller(place).path)
        else:
            with observer.guard():
                self._read(logits, plan.arranged, plan.masked, place)
                observer.finish()

    def _caller(self, place: int) -> Caller:
        return Caller(self._name, (("compiled", "softmax", place),), self._heads)

    def _read(self, logits: Tensor, arranged: Arrangement, masked: bool, place: int) -> None:
        caller = self._caller(place)
        if self._observer.refuses(caller, logits):
            return
        given, others = arranged.split(arranged.by_head(plain(logits), self._heads))
        sinks = None if others is None else others.float().logsumexp(-1, keepdim=True)
        source = Logits(given, None, arranged.places.on(given.device), None, sinks, masked=masked)
        call = Call(caller, arranged.places.cross, arranged.places)
        self._observer.record(call, self._observer.read(call, source))

    def _record(self, call: dict[str, Any], padding: Tensor | None, added: int, place: int) -> None:
        observer, caller = self._observer, Caller(self._name, (("compiled", "", place),), self._heads)
        if observer.refuses(caller, call["query"], call["key"], call["attn_mask"]):
            return
        if padding is None and _may_hold_padding(call["attn_mask"]):
            observer.uncovered.add(
                f"the attention of {self._name} in a compiled graph, whose mask differs between sequences and queries: "
                "it does not tell which queries are padding"
            )
            return
        source = observer.source(caller, partial(dot_product.query_key, call))
        if source is not None:
            where = dot_product.placed((place, source.shape.queries, source.shape.keys), added, observer.stands)
            observer.padding.clear()
            if padding is not None:
                for tokens in where.queries:
                    observer.padding.say_of(tokens, padding)
            observer.record_source(Call(caller, where.cross, where), source)


def _may_hold_padding(mask: Tensor | None) -> bool:
    """Whether a mask has entries of its own for each query of each sequence: outside of graphs an argument tells."""
    return mask is not None and mask.dim() == 4 and all(mask.size(i) > 1 and mask.stride(i) != 0 for i in (0, 2))


class TracedMode(TorchFunctionMode):
    """Adds an operator to the graph after each dot product. Does nothing where nothing is traced.

    Modes of the modules around the owner see the same call: `nesting` tells the innermost.
    """

    def __init__(self, handle: Tensor, reads: bool) -> None:
        self._handle = handle
        self.reads = reads

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and record it where it is a dot product."""
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func is _DOT_PRODUCT:
            return self._recorded(_record, func, args, kwargs)
        if func is multi_head.FUNCTION:
            return self._recorded(_record_multi_head, func, args, kwargs)
        if not self.reads:
            return stack.call(func, args, kwargs)
        known = _is_softmax(func)
        result = self._recorded(_record_softmax, func, args, kwargs) if known else stack.call(func, args, kwargs)
        look()
        return result

    def _recorded(self, record: Callable[..., None], func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        innermost = enter_nesting()
        result = func(*args, **kwargs)
        leave_nesting()
        if innermost:
            record(self._handle, *args, **kwargs)
        return result


def _is_softmax(func: Any) -> bool:
    return (
        func is torch.softmax
        or func is Tensor.softmax
        or func is functional.softmax
        or func is torch.log_softmax
        or func is Tensor.log_softmax
        or func is functional.log_softmax
    )


def _record_softmax(handle: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        operators.logits(handle, input.detach(), new_number(), place())


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
        operators.attention(handle, query.detach(), key.detach(), mask, None, is_causal, scale, 0, place())


def _record_multi_head(handle: Tensor, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        query, key, mask, padding, added = multi_head.projected(*args, **kwargs)
        operators.attention(handle, query, key, mask, padding, False, None, added, place())


def put_mode_on(module: nn.Module, args: Any) -> None:
    """The forward pre-hook."""
    owner = module.__dict__.get(OWNER)
    if owner is None:
        return
    sampled = owner.running.training and owner.running.sampled
    if torch.compiler.is_compiling():
        where = scope()
        if where != "elsewhere":
            run_in(where, note_compiled, owner.running)
            if sampled:
                run_in(where, stack.push_mode, owner.mode)
    elif sampled:
        owner.running.note_fired()
        beside(stack.push_mode, owner.mode)


def take_mode_off(module: nn.Module, args: Any, output: Any) -> None:
    """The forward hook."""
    owner = module.__dict__.get(OWNER)
    if owner is None or not (owner.running.training and owner.running.sampled):
        return
    if not torch.compiler.is_compiling():
        beside(stack.remove, owner.mode)
        return
    where = scope()
    if where != "elsewhere":
        run_in(where, stack.pop_mode)


class TracedAttention:
    """The hooks by which attention is found inside compiled graphs, on every module whose code may compute it."""

    def __init__(self, observer: Observer, running: Running, reads: bool) -> None:
        """reads: also what is written out."""
        self._reads = reads
        self._observer = observer
        self._running = running
        self._handles: list[RemovableHandle] = []
        self._owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
        skip_frames(put_mode_on, take_mode_off)

    def arm(self, modules: Modules) -> None:
        """A step to sample begins."""
        if self._handles:
            return
        with self._observer.gate.boundary():
            for name, module in modules:
                kind: Any = type(module)
                if _may_own(kind) or (self._reads and not is_torchs(kind)):
                    self._hook(name, module)

    def disarm(self) -> None:
        """Take the hooks off, unless a compiled graph holds them."""
        if not self._running.compiled:
            self._remove()

    def detach(self) -> None:
        """Take everything off."""
        self._remove()
        for module in list(self._owners):
            unmark(module, OWNER)
        self._owners.clear()

    def interrupted(self) -> None:
        """A forward pass has ended, perhaps by an exception: nothing stays entered."""
        for owner in self._owners.values():
            stack.remove(owner.mode)

    def _hook(self, name: str, module: nn.Module) -> None:
        owner = self._owners.get(module)
        if owner is None:
            owner = self._owners[module] = Owner(name, module, self._running, self._observer, self._reads)
        mark(module, OWNER, owner)
        self._handles += [module.register_forward_pre_hook(put_mode_on), module.register_forward_hook(take_mode_off)]

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


@cache
def _may_own(kind: Any) -> bool:
    """Whether the own code of a class of modules may compute attention, by its names.

    Tracing under a mode is not what Dynamo does best, so that it is kept to where it is needed.
    """
    if kind.__module__.startswith("torch.nn."):
        return issubclass(kind, nn.MultiheadAttention)
    codes = [getattr(member, "__code__", None) for member in vars(kind).values()]
    names = [name for code in codes if code is not None for name in names_in(code)]
    return "att" in kind.__name__.lower() or any(word in name for name in names for word in _SAYS)
