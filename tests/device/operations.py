"""Operations of the device that is not there: each is a point on a stream, and touches memory there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.device import waits
from tests.device.memory import found, memory, storage_of
from tests.device.streams import Stream, current_stream, machine


def order(function: Any, args: Any, kwargs: Any, operands: dict[int, Any], device: torch.device | None) -> None:
    """An operation is about to run on the current stream: its operands, by the identity of `inner`, must be ready."""
    if device is None and not operands:
        return
    now = current_stream(device or next(iter(operands.values())).device)
    others = [current_stream(place) for place in {one.device for one in operands.values()} if place != now.device]
    for other in others:  # a copy between devices, which torch orders on both sides
        now.see(other.seen)
    point = now.point()
    for other in others:
        other.see(now.seen)
    name = function._schema.name
    if machine.capturing and now in machine.capturing and waits.ours() is not None:
        found.append(f"{name} becomes part of the user's graph, at {waits.ours()}")
    for value, argument in zip(args, function._schema.arguments, strict=False):
        _touch(value, argument, operands, now, point, name)
    for argument in function._schema.arguments:
        if argument.name in kwargs:
            _touch(kwargs[argument.name], argument, operands, now, point, name)


def _touch(value: Any, argument: Any, operands: dict[int, Any], now: Stream, point: int, name: str) -> None:
    alias = argument.alias_info
    if alias is not None and not alias.is_write:
        return  # a view
    for tensor in value if isinstance(value, (list, tuple)) else (value,):
        if id(tensor) in operands and tensor.layout is torch.strided:
            memory.touch(tensor, now, point, alias is not None, name)


def wrote(out: Any, operands: list[Tensor], device: torch.device | None) -> None:
    """What is new in its result was written on the current stream."""
    if device is None:
        return
    old = {storage_of(tensor) for tensor in operands if tensor.layout is torch.strided}
    now = current_stream(device)
    for tensor in out if isinstance(out, (list, tuple)) else (out,):
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and storage_of(tensor) not in old:
            memory.is_new(tensor, now, now.seen[now])
