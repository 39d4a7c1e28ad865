"""Operators that a compiled graph calls and does not look into, each for one object of ours.

A graph is shared by equal modules, so that it cannot hold the object. It holds the place of a handle: a tensor with
the number of the object, which lives as long as somebody else keeps it. The operator says that it writes to the handle,
for one that changes nothing would be left out, and one that has no order could be run at any time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor
from torch.library import Library, register_fake

from torchprobe.buffer.transfer import records_graph
from torchprobe.capture.compat import hear_gradient, in_backward, last_hook, no_torch_function, skip_frames
from torchprobe.capture.compiled.private_names import find
from torchprobe.capture.compiled.tracing import beside
from torchprobe.capture.gate import no_graph
from torchprobe.statistics import fused

NAMESPACE = "torchprobe_graph"
_operators = Library(NAMESPACE, "FRAGMENT")
_numbers = itertools.count()
_objects: dict[int, ReferenceType[Any]] = {}  # by number, while they live


def handle(target: Any) -> Tensor:
    """The handle of an object: a tensor in host memory, whatever the model's device.

    target: has the methods that the operators below call, of those that it is handed to. One of no dimension would be
    moved to the GPU by Inductor, under CUDA graphs, where a graph only hands it on.
    """
    number = next(_numbers)
    _objects[number] = ReferenceType(target, functools.partial(_objects.pop, number))  # by default the reference
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return torch.from_numpy(np.array([number]))
    return torch.from_numpy(np.array([number]))  # of which no mode of the user's hears


class GradientHook:
    """A hook of a tensor, one operator in the graph of compiled autograd, which would break at each that is traced.

    function: takes a gradient; runs beside Dynamo. More may follow: see `listen`.
    """

    __torch_unserializable__ = True  # a user who pickles an output is not warned of a hook that he did not make

    def __init__(self, function: Callable[[Any], None], version: int = -1) -> None:
        self.functions = [function]
        self.version = version  # of the tensor, for which alone more may follow
        self.handle = handle(self)

    def hear(self, gradient: Tensor | None) -> None:
        """A gradient is there: tell all functions, in order. None: autograd's, of what a loss leaves out."""
        with no_torch_function(), no_graph():
            for function in () if gradient is None else self.functions:
                function(gradient)

    def __call__(self, gradient: Tensor | None) -> None:
        """A gradient arrives."""
        if not torch.compiler.is_compiling():
            beside(self.hear, gradient)
        elif gradient is not None:
            heard(self.handle, gradient)


class PassHook(GradientHook):
    """One that tells of the backward pass itself: what follows, such as a step that begins, is no statistic."""

    def hear(self, gradient: Tensor | None) -> None:
        """The backward pass has come so far."""
        self.functions[0](gradient)


skip_frames(GradientHook.__call__)


def joinable(tensor: Tensor) -> GradientHook | None:
    """The hook of a tensor that runs last, if it is ours and nothing was written into the tensor since."""
    last = last_hook(tensor)
    return last if type(last) is GradientHook and last.version == tensor._version else None


def listen(tensor: Tensor, function: Callable[[Any], None], hook: GradientHook | None = None) -> None:
    """Have a function called with the gradient of a tensor that a graph made.

    It joins a hook of ours that is the last: hooks run in order, each after what the one before has made of a gradient.
    """
    hook = hook or joinable(tensor)
    if hook is None:
        hear_gradient(tensor, GradientHook(function, tensor._version))
    else:
        hook.functions.append(function)


def _target(handle: Tensor) -> Any:
    """The object of a handle; None while the user captures a graph, of which this would become part."""
    found = None if records_graph() else _objects.get(int(handle.numpy()[0]))  # made by `handle`, in host memory
    target = None if found is None else found()
    if target is not None:
        _keep_version(target.handle)
    return target


def _keep_version(handle: Tensor) -> None:
    """What a graph writes back at the end of its backward pass must not fail that of another call, which saved it."""
    running, keeper = find("torch._C:_current_autograd_node"), find("torch.autograd:_unsafe_preserve_version_counter")
    node = None if running is None or keeper is None else running()
    if node is None:
        return
    version = keeper(handle)

    def restore(*_: Any) -> None:
        hook.remove()
        version.__exit__(None, None, None)

    hook = node.register_hook(restore)


def _forward(handle: Tensor) -> Any:
    """The same; None in a recomputation, too."""
    return None if in_backward() else _target(handle)


def _attention(handle: Tensor, *call: Any) -> None:
    if (target := _forward(handle)) is not None:
        target.record_call(*call)


def _logits(handle: Tensor, *call: Any) -> None:
    if (target := _forward(handle)) is not None:
        target.record_logits(*call)


def _tensor(handle: Tensor, tensor: Tensor, training: bool, gradient: bool) -> None:
    if (target := _target(handle) if gradient else _forward(handle)) is not None:
        target.record_tensor(tensor, training, gradient)


def _row(handle: Tensor, row: Tensor, training: bool, gradient: bool) -> None:
    if (target := _target(handle) if gradient else _forward(handle)) is not None:
        target.record_row(row, training, gradient)


def _heard(handle: Tensor, gradient: Tensor) -> None:
    if (target := _target(handle)) is not None:
        beside(target.hear, gradient)


def _unread(handle: Tensor) -> None:
    if (target := _forward(handle)) is not None:
        target.note_unread()


_UNSAFE = [tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None]


def _define(name: str, arguments: str, body: Any, tags: Sequence[torch.Tag] = tuple(_UNSAFE)) -> Any:
    """Without tags one that a graph of the device may hold."""
    _operators.define(f"{name}(Tensor(a!) {arguments}) -> ()", tags=tags)
    _operators.impl(name, body, "CompositeExplicitAutograd")
    register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=_operators)
    return getattr(torch.ops.torchprobe_graph, name).default


_CALL = "Tensor query, Tensor key, Tensor? mask, Tensor? padding, bool causal, float? scale, int added, int place"
attention = _define("attention", f"handle, {_CALL}", _attention)
logits = _define("logits", "handle, Tensor logits, int number, int place", _logits)
tensor = _define("tensor", "handle, Tensor tensor, bool training, bool gradient", _tensor)
unread = _define("unread", "handle", _unread)
heard = _define("heard", "handle, Tensor gradient", _heard)
row = _define("row", "handle, Tensor row, bool training, bool gradient", _row)
add_in_place = _define("add_in_place", "lines, Tensor tensor", lambda lines, x: fused.add(x, lines), ())
add_all_in_place = _define(
    "add_all_in_place",
    "lines, Tensor places, Tensor like, int programs, int span",
    lambda lines, places, like, programs, span: fused.add_all(like, lines, places, programs, span),
    (),
)
