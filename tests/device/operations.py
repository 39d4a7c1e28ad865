"""Operations of the device that is not there: each is a point on a stream, and touches memory there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.device import waits
from tests.device.memory import found, memory, storage_of
from tests.device.streams import Stream, current_stream, machine


def order(function: Any, args: Any, kwargs: Any, operands: dict[int, Any], device: Any) -> Stream | None:
    """An operation is about to run on the current stream: its operands, by the identity of `inner`, must be ready."""
    if device is None and not operands:
        return None
    places = {one.device for one in operands.values()}
    now = current_stream(device or next(iter(places)))
    others = [current_stream(place) for place in places if place != now.device] if places != {now.device} else ()
    for other in others:  # a copy between devices, which torch orders on both sides
        now.see(other.seen)
    point = now.point()
    for other in others:
        other.see(now.seen)
    name, arguments, writing = _schema(function)
    if machine.capturing and now in machine.capturing and waits.ours() is not None:
        found.append(f"{name} becomes part of the user's graph, at {waits.ours()}")
    for value, writes in zip(args, writing, strict=False):
        if writes is None:
            continue
        if id(value) in operands:
            if value.layout is torch.strided:
                memory.touch(value, now, point, writes, name)
        elif isinstance(value, (list, tuple)):
            _touch(value, writes, operands, now, point, name)
    for argument, writes in arguments if kwargs else ():
        if writes is not None and argument in kwargs:
            _touch(kwargs[argument], writes, operands, now, point, name)
    return now


@waits.by_identity
def _schema(function: Any) -> tuple[str, list[tuple[str, bool | None]], list[bool | None]]:
    """An operation's name; of each argument its name and whether it is written (None: viewed); the latter alone."""
    arguments = function._schema.arguments
    aliases = [argument.alias_info for argument in arguments]
    writes = [None if alias is not None and not alias.is_write else alias is not None for alias in aliases]
    return function._schema.name, [(a.name, write) for a, write in zip(arguments, writes, strict=True)], writes


def _touch(value: Any, writes: bool, operands: dict[int, Any], now: Stream, point: int, name: str) -> None:
    for tensor in value if isinstance(value, (list, tuple)) else (value,):
        if id(tensor) in operands and tensor.layout is torch.strided:
            memory.touch(tensor, now, point, writes, name)


def wrote(out: Any, operands: list[Tensor], now: Stream) -> None:
    """What is new in its result was written on a stream."""
    results = out if isinstance(out, (list, tuple)) else (out,)
    new = [(t, storage_of(t)) for t in results if isinstance(t, Tensor) and t.layout is torch.strided]
    if new:
        old = [storage_of(tensor) for tensor in operands if tensor.layout is torch.strided]
        for tensor, storage in new:
            if storage not in old:
                memory.is_new(tensor, storage, now, now.seen[now])
