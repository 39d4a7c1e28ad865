"""Operators that a compiled graph calls and does not look into, each for one object of ours.

A graph is shared by equal modules, so that it cannot hold the object. It holds the place of a handle: a tensor with
the number of the object, which lives as long as somebody else keeps it. The operator says that it writes to the handle,
for one that changes nothing would be left out, and one that has no order could be run at any time.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import Library, register_fake

from torchprobe.buffer.transfer import records_graph
from torchprobe.capture.compat import in_backward

_library = Library("torchprobe_graph", "FRAGMENT")
_numbers = itertools.count()


class _Attention(Protocol):
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
        """An attention was computed."""


class _Unread(Protocol):
    def note_unread(self) -> None:
        """An attention was computed whose statistics cannot be had."""


class _Output(Protocol):
    def record_tensor(self, tensor: Tensor, training: bool, gradient: bool) -> None:
        """A tensor was computed."""

    def record_row(self, new: Tensor, training: bool, gradient: bool) -> None:
        """The statistic of a tensor was computed."""


_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


def handle(target: _Attention | _Output | _Unread) -> Tensor:
    """The handle of an object: a tensor in host memory, whatever the model's device."""
    number = next(_numbers)
    _objects[number] = target
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def _target(handle: Tensor) -> Any:
    """The object of a handle; None while the user captures a graph, of which this would become part."""
    return None if records_graph() else _objects.get(int(handle.numpy()))  # made by `handle`, in host memory


def _attention(handle: Tensor, *call: Any) -> None:
    target = None if in_backward() else _target(handle)  # a recomputation
    if target is not None:
        target.record_call(*call)


def _tensor(handle: Tensor, tensor: Tensor, training: bool, gradient: bool) -> None:
    target = _target(handle) if gradient or not in_backward() else None
    if target is not None:
        target.record_tensor(tensor, training, gradient)


def _row(handle: Tensor, row: Tensor, training: bool, gradient: bool) -> None:
    target = _target(handle) if gradient or not in_backward() else None
    if target is not None:
        target.record_row(row, training, gradient)


def _unread(handle: Tensor) -> None:
    if not in_backward():
        target = _target(handle)
        if target is not None:
            target.note_unread()


def _define(name: str, arguments: str, body: Any) -> Any:
    tags = [tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None]
    every = ", ".join(("Tensor(a!) handle", *([arguments] if arguments else [])))
    _library.define(f"{name}({every}) -> ()", tags=tags)
    _library.impl(name, body, "CompositeExplicitAutograd")
    register_fake(f"torchprobe_graph::{name}", lambda *args: None, lib=_library)
    return getattr(torch.ops.torchprobe_graph, name).default


_CALL = "Tensor query, Tensor key, Tensor? mask, Tensor? padding, bool causal, float? scale, int added, int place"
attention = _define("attention", _CALL, _attention)
tensor = _define("tensor", "Tensor tensor, bool training, bool gradient", _tensor)
unread = _define("unread", "", _unread)
row = _define("row", "Tensor row, bool training, bool gradient", _row)
