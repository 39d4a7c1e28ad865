"""The function mode that is on the stack during a sampled forward pass: it runs each call, then looks at a few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from torchprobe.capture.attention import dot_product, flex, functions, kernels, multi_head, stack
from torchprobe.capture.attention.handwritten import Handwritten
from torchprobe.capture.attention.layout import unusual
from torchprobe.capture.attention.observer import Call, Observer
from torchprobe.capture.attention.owner import INSIDE_GRAPH
from torchprobe.capture.attention.provenance import is_cross
from torchprobe.capture.attention.uncovered import unknown_shapes
from torchprobe.capture.compat import HigherOrderOperator, OpOverload, OpOverloadPacket, under_transform
from torchprobe.statistics.attention import QueryKey

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Tensors = tuple[Tensor, Tensor, Tensor | None]

_SOFTMAXES = functions.SOFTMAXES | functions.LOG_SOFTMAXES | functions.EXPONENTIALS
_WRITTEN_OUT = functions.PRODUCTS | _SOFTMAXES | functions.CARRIERS
_DOT_PRODUCTS = frozenset(dot_product.FUNCTIONS)
_OF_INTEREST = _WRITTEN_OUT | _DOT_PRODUCTS | {multi_head.FUNCTION}
_OPERATORS = (OpOverload, OpOverloadPacket, HigherOrderOperator)


class AttentionMode(TorchFunctionMode):
    """Sees every torch function that the pass calls. The user's call comes first, and its result is returned as is."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._handwritten = Handwritten(observer)
        self._within: Call | None = None  # the multi-head attention whose steps are running
        self._steps: Function | None = None

    def forget(self) -> None:
        """The pass is over: hold nothing of it."""
        self._handwritten.forget()
        self._within = self._steps = None

    def __torch_function__(
        self, func: Function, types: Any, args: Args = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and look at it where it may be part of an attention."""
        kwargs = kwargs or {}
        if is_compiling():
            return stack.call(func, args, kwargs)
        if func not in _OF_INTEREST and not isinstance(func, _OPERATORS):
            return func(*args, **kwargs)
        if func is multi_head.FUNCTION:
            return self._run_multi_head(types, args, kwargs)
        result = func(*args, **kwargs)
        if not self._observer.idle:
            self._after(func, args, kwargs, result)
        return result

    def _after(self, func: Function, args: Args, kwargs: Kwargs, result: Any) -> None:
        if func in _WRITTEN_OUT:
            self._handwritten.after(func, args, kwargs, result, self._within)
        elif func in _DOT_PRODUCTS:
            with self._observer.guard():
                self._after_dot_product(dot_product.arguments(args, kwargs))
        else:
            with self._observer.guard():
                self._after_operator(func, args, kwargs)

    # ---- calls that name their queries and keys

    def _after_dot_product(self, call: Kwargs) -> None:
        tensors = (call["query"], call["key"], call.get("attn_mask"))
        self._record(tensors, partial(dot_product.query_key, call))

    def _after_operator(self, func: Function, args: Args, kwargs: Kwargs) -> None:
        if (call := flex.arguments(func, args, kwargs)) is not None:
            source_of = partial(_without_heads, flex.query_key, call)
            self._record((call["query"], call["key"], None), source_of, beyond_graphs=True)  # it compiles itself
        elif (call := kernels.arguments(func, args, kwargs)) is not None:
            reason = kernels.unread(call)
            if reason is None:
                self._record(kernels.tensors(call), partial(_without_heads, kernels.query_key, call))
            else:
                self._observer.uncovered.add(reason)

    def _record(
        self, tensors: Tensors, source_of: Callable[[int | None], QueryKey], beyond_graphs: bool = False
    ) -> None:
        """tensors: query, key and mask, as the user has them; source_of: takes the module's number of heads."""
        caller = self._within.caller if self._within else self._observer.owners.caller(beyond_graphs)
        if caller is INSIDE_GRAPH:
            return
        reason = "torch.func transforms" if under_transform() else unusual(*tensors)
        if caller is None or reason is not None:
            self._observer.uncovered.add(reason or "calls from outside of the model's modules")
            return
        try:
            source = source_of(caller.heads)
        except ValueError:
            self._observer.uncovered.add(unknown_shapes(caller.name))
            return
        call = self._within or Call(caller, is_cross(tensors[0], tensors[1], *source.shape[2:]))
        self._observer.record_source(call, source, self._observer.training)

    # ---- nn.MultiheadAttention

    def _run_multi_head(self, types: Any, args: Args, kwargs: Kwargs) -> Any:
        within = None
        if self._observer.idle:
            return multi_head.FUNCTION(*args, **kwargs)
        with self._observer.guard():
            within = self._multi_head_call(types, multi_head.arguments(args, kwargs))
        if within is None:
            return multi_head.FUNCTION(*args, **kwargs)
        if not stack.is_shared():
            return self._step_through(within, args, kwargs)
        result = multi_head.FUNCTION(*args, **kwargs)  # the user's own mode wants to see one call, not its steps
        with self._observer.gate.boundary(), stack.emptied(), torch.no_grad():
            self._step_through(within, (), multi_head.arguments(args, kwargs) | {"training": False})
        return result

    def _multi_head_call(self, types: Any, call: Kwargs) -> Call | None:
        reason = "torch.func transforms" if under_transform() else unusual(call["query"], call["key"])
        caller = self._observer.owners.caller()
        if caller is INSIDE_GRAPH:
            return None
        if reason is None and any(map(_overrides, types)):
            reason = "multi-head attention of tensor subclasses"
        if reason is not None or caller is None:
            self._observer.uncovered.add(reason or "calls from outside of the model's modules")
            return None
        return multi_head.call_of(call, caller)

    def _step_through(self, within: Call, args: Args, kwargs: Kwargs) -> Any:
        """Run multi-head attention so that its dot product, or its softmax, is seen."""
        self._steps = self._steps or multi_head.transparent()
        self._within = within
        stack.push(self)
        try:
            return self._steps(*args, **kwargs)
        finally:
            stack.remove(self)
            self._within = None


def _without_heads(query_key: Callable[[Kwargs], QueryKey], call: Kwargs, heads: int | None) -> QueryKey:
    return query_key(call)


def _overrides(kind: type) -> bool:
    """Whether a tensor class has a `__torch_function__` of its own, or inherits one: parameters do not."""
    return kind is not Tensor and kind.__torch_function__ is not Parameter.__torch_function__  # type: ignore[attr-defined]
