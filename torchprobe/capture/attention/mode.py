"""The function mode that is on the stack during a sampled forward pass: it runs each call, then looks at a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from torchprobe.capture.attention import dot_product, multi_head, stack
from torchprobe.capture.attention.functions import ITERATIONS
from torchprobe.capture.attention.handwritten import Handwritten
from torchprobe.capture.attention.labelling import Labelling
from torchprobe.capture.attention.labels import Label, roots_of
from torchprobe.capture.attention.layout import by_name, heads_of_call, is_head
from torchprobe.capture.attention.observer import Call, Observer
from torchprobe.capture.attention.sites import INSIDE_GRAPH, Caller
from torchprobe.capture.attention.softmaxes import Softmaxes
from torchprobe.capture.attention.tape import Args, Function, Kwargs, is_plain
from torchprobe.capture.compat import no_torch_function
from torchprobe.capture.compiled import operators
from torchprobe.statistics.attention import QueryKey

SourceOf = Callable[[int | None], QueryKey]

_DOT_PRODUCTS = frozenset(dot_product.FUNCTIONS)


class AttentionMode(TorchFunctionMode):
    """Sees every torch function that the pass calls. The user's call comes first, and its result is returned as is."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        labels = Labelling()
        self.handwritten = Handwritten(observer, labels, Softmaxes(observer, labels))
        self._flex = False  # whether its operator was seen since
        self.handle = operators.handle(self)
        self._within: Caller | None = None  # the multi-head attention whose steps are running
        self._steps: Function | None = None

    def note_unread(self) -> None:
        """A function that is compiled by itself has called `flex_attention`; its operator is seen or not there."""
        observer, seen, self._flex = self._observer, self._flex, False
        if not observer.idle and not seen:
            caller = observer.owners.caller(beyond_graphs=True)
            name = "a function outside of the model" if caller is None else caller.name
            observer.uncovered.add(f"the attention of {name}, a flex_attention that is compiled by itself")

    def forget(self) -> None:
        """The pass is over: hold nothing of it."""
        with self._observer.guard():
            self.handwritten.finish()
            self._observer.finish()
        self.handwritten.forget()
        self._within = self._steps = None

    def __torch_function__(
        self, func: Function, types: Any, args: Args = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and look at it where it may be part of an attention."""
        kwargs = kwargs or {}
        if is_compiling():
            result = stack.call(func, args, kwargs)
            if func is stack.FLEX:
                operators.unread(self.handle)
            return result
        if not _has_hash(func):
            return func(*args, **kwargs)
        if func is multi_head.FUNCTION:
            return self._run_multi_head(types, args, kwargs)
        result = func(*args, **kwargs)
        if self._observer.idle:
            return result
        if func in ITERATIONS:
            parts = tuple(result)
            self._after(func, args, kwargs, parts)
            return iter(parts)
        self._after(func, args, kwargs, result)
        return result

    def _after(self, func: Function, args: Args, kwargs: Kwargs, result: Any) -> None:
        if not isinstance(result, Tensor | tuple | list | None):
            return
        with self._observer.gate.boundary(), no_torch_function():
            self.handwritten.after(func, args, kwargs, result, self._within)
        if func in _DOT_PRODUCTS:
            with self._observer.guard():
                call = by_name(dot_product.PARAMETERS, args, kwargs)
                source_of = partial(dot_product.query_key, call)
                self._record((call["query"], call["key"], call.get("attn_mask")), source_of)
        elif stack.is_operator(func):
            with self._observer.guard():
                self._after_operator(func, args, kwargs)

    # ---- calls that name their queries and keys

    def _after_operator(self, func: Function, args: Args, kwargs: Kwargs) -> None:
        call = dot_product.call_of(func, args, kwargs)
        if call is None:
            return
        self._flex = self._flex or call.is_flex
        if call.unread is None:
            self._record(call.tensors, lambda heads: call.query_key(), call.is_flex)  # which compiles itself
        else:
            self._observer.uncovered.add(call.unread)

    def _record(self, tensors: dot_product.Tensors, source_of: SourceOf, beyond_graphs: bool = False) -> None:
        """tensors: query, key and mask, as the user has them; source_of: takes the module's number of heads."""
        caller = self._within or self._observer.owners.caller(beyond_graphs)
        if caller is INSIDE_GRAPH or self._observer.refuses(caller, *tensors) or caller is None:
            return
        source = self._observer.source(caller, source_of)
        if source is None:
            return
        query, key = tensors[:2]
        where, who = self.handwritten.places(query, key, source.shape), None
        if is_plain(query) and is_plain(key) and min(query.dim(), key.dim()) > 1:
            of_query, of_key = (self.handwritten.labels.of(self.handwritten.tape.node(one)) for one in (query, key))
            source, who = _by_heads(source, of_query), heads_of_call(of_query, of_key)
            if lost := next((root.lost for root in roots_of(of_query.dims[:-2]) if root.lost), None):
                self._observer.uncovered.add(f"the attention of {caller.name}, whose heads pass `{lost}`")
                self._observer.sites.refuse(caller.name, caller.path)
        self._observer.record_source(Call(caller, where.cross, where), source, who)

    # ---- nn.MultiheadAttention

    def _run_multi_head(self, types: Any, args: Args, kwargs: Kwargs) -> Any:
        within = None
        if not self._observer.idle:
            with self._observer.guard():
                self._steps = self._steps or multi_head.transparent()
                within = self._multi_head_call(types, by_name(multi_head.PARAMETERS, args, kwargs))
        if within is None:
            return multi_head.FUNCTION(*args, **kwargs)
        if not stack.is_shared():
            return self._step_through(within, args, kwargs)
        result = multi_head.FUNCTION(*args, **kwargs)  # the user's own mode wants to see one call, not its steps
        with self._observer.gate.boundary(), stack.emptied(), torch.no_grad():
            self._step_through(within, (), by_name(multi_head.PARAMETERS, args, kwargs) | {"training": False})
        return result

    def _multi_head_call(self, types: Any, call: Kwargs) -> Caller | None:
        caller = self._observer.owners.caller()
        if caller is INSIDE_GRAPH or self._observer.refuses(caller, call["query"], call["key"]) or caller is None:
            return None
        if any(map(_overrides, types)):
            self._observer.uncovered.add("multi-head attention of tensor subclasses")
            return None
        padded = call.get("key_padding_mask")
        if padded is not None:
            self.handwritten.say_padded(call["key"], multi_head.is_padding(padded), 0)
        return caller._replace(heads=int(call["num_heads"]))

    def _step_through(self, within: Caller, args: Args, kwargs: Kwargs) -> Any:
        """Run multi-head attention so that its dot product, or its softmax, is seen."""
        assert self._steps is not None
        self._within = within
        stack.push_mode(self)
        try:
            return self._steps(*args, **kwargs)
        finally:
            stack.remove(self)
            self._within = None


def _by_heads(source: QueryKey, query: Label) -> QueryKey:
    """With heads in their dimension, where the data flow tells that they are elsewhere, or folded into the batch."""
    digits = [digit for dim in query.dims[:-2] for digit in dim]
    heads, shape = [i for i, digit in enumerate(digits) if is_head(digit)], source.shape
    sizes, many = [digit.size for digit in digits], math.prod(digits[i].size for i in heads)
    order = [i for i in range(len(sizes)) if i not in heads] + heads
    stand = order == sorted(order) and many == shape.heads
    if stand or many == 1 or math.prod(sizes) != shape.batch * shape.heads or source.group > 1:
        return source

    def moved(x: Tensor) -> Tensor:
        x = x.flatten(0, 1).unflatten(0, sizes).permute(*order, len(sizes), len(sizes) + 1)
        return x.reshape(-1, many, *x.shape[-2:])

    mask = source.mask
    if mask is not None and math.prod(mask.shape[:-2]) > 1:
        mask = moved(mask.expand(shape.batch, shape.heads, -1, -1))
    return replace(source, query=moved(source.query), key=moved(source.key), mask=mask)


def _has_hash(func: Any) -> bool:
    try:
        hash(func)
    except TypeError:  # a callable of the user's that has none
        return False
    return True


def _overrides(kind: Any) -> bool:
    """Whether a tensor class has a `__torch_function__` of its own, or inherits one: parameters do not."""
    return kind is not Tensor and kind.__torch_function__ is not nn.Parameter.__torch_function__
