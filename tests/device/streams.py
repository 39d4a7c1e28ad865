"""Streams, events and pinned memory of the device that is not there, and who is ordered after whom.

Every access to memory of a device, and every copy, is a point on a stream. One that touches what another stream wrote
(or writes what it read) must come after it: through an event or `wait_stream`, or because the host waited for an event
in between. Otherwise `found` gets a line, as NVIDIA's compute sanitizer would say it. Copies to pinned memory run when
somebody waits for them, as late as a device may: a slot that is written too early gives wrong numbers as well.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.device import waits
from tests.device.memory import found, memory

_state = threading.local()


class DeviceLostError(RuntimeError):
    """What a device raises that has fallen off the bus."""


class Stream:
    """Operations in order. `seen` is how far it, and every other stream, had come by what it was ordered after."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("fgpu", current_device()) if device is None else torch.device(device)
        self.seen: defaultdict[Stream, int] = defaultdict(int)
        self.waiting: list[Copy] = []  # that have yet to run
        self.done = 0  # the last of those that have

    def point(self) -> int:
        """One more operation: its number."""
        number = self.seen[self] = self.seen[self] + 1
        return number

    def wait_stream(self, other: Stream) -> None:
        look_at_capture("wait_stream")
        self.see(other.seen)

    def wait_event(self, event: Event) -> None:
        self.see(event.seen)

    def see(self, seen: dict[Stream, int]) -> None:
        for stream, point in seen.items():
            self.seen[stream] = max(self.seen[stream], point)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        event = Event()
        event.record(self)
        event.synchronize()

    def run_next(self) -> None:
        """A copy arrives, one of those that were put on the stream first."""
        if self.waiting:
            copy = self.waiting.pop(0)
            self.done = copy.point
            copy.run()

    def run_until(self, point: int) -> None:
        while self.waiting and self.waiting[0].point <= point:
            self.run_next()

    def keep_source(self, point: int) -> None:
        """What comes after a copy is about to write over what it reads."""
        for copy in self.waiting:
            if copy.point == point:
                copy.keep_source()


class Copy:
    """From a device to pinned memory, at a point of a stream. It reads when it runs, which is as late as can be."""

    def __init__(self, point: int, host: Tensor, source: Tensor) -> None:
        self.point, self.host, self.source = point, host, source

    def keep_source(self) -> None:
        self.source = self.source.clone()

    def run(self) -> None:
        self.host.copy_(self.source)


class Event:
    """A place on a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.stream: Stream | None = None
        self.seen: dict[Stream, int] = {}
        self.queries = 0

    def record(self, stream: Stream | None = None) -> None:
        look_at_capture("an event is recorded")
        self.stream = stream or current_stream()
        self.stream.point()
        self.seen = dict(self.stream.seen)

    def synchronize(self) -> None:
        """Wait for it: the host, and all that it queues from now on, comes after it."""
        look_at_capture("an event is waited for", everywhere=True)
        waits.host_reads("Event.synchronize")
        self._arrive()

    def query(self) -> bool:
        """Whether it has been reached: a device takes its time, so not at the first look."""
        look_at_capture("an event is queried", everywhere=True)
        self.queries += 1
        if machine.lost or self.queries <= machine.slow:
            return False
        self._arrive()
        return True

    def _arrive(self) -> None:
        if machine.lost:
            raise DeviceLostError("the device is lost")
        if self.stream is not None:
            self.stream.run_until(self.seen[self.stream])
        memory.host_waited(self.seen)


class Machine:
    """What is the matter with the device: nothing, unless a test says so."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.lost = False  # nothing arrives any more
        self.slow = 1  # looks of the host between two copies that arrive
        self.capturing: set[Stream] = set()
        self._looks = 0
        self._streams: list[Stream] = []

    def follow(self, stream: Stream) -> None:
        """A copy was put on a stream."""
        with memory.lock:
            self._streams.append(stream)

    def go_on(self) -> None:
        """Time passes: the host has looked at what has arrived, and one more copy may."""
        with memory.lock:
            for one in set(self._streams):
                memory.host_waited({one: one.done})
            self._looks += 1
            if self._streams and not self.lost and self._looks % (1 + self.slow) == 0:
                self._streams.pop(0).run_next()


machine = Machine()
_defaults: dict[torch.device, Stream] = {}
_of_forward: dict[torch.device, Stream] = {}  # chosen last, in the thread that trains


def clear() -> None:
    """As after a start."""
    memory.clear()
    machine.clear()
    _defaults.clear()
    _of_forward.clear()
    _state.__dict__.clear()
    found.clear()
    waits.found.clear()


def current_device() -> int:
    return getattr(_state, "device", 0)


def default_stream(device: Any = None) -> Stream:
    device = _device(device)
    known = _defaults.get(device)
    return known or _defaults.setdefault(device, Stream(device))


def current_stream(device: Any = None) -> Stream:
    device = _device(device)
    chosen = _state.__dict__.get("streams")
    if not chosen and torch._C._current_graph_task_id() != -1:
        chosen = _of_forward  # autograd's own thread runs a backward pass on the streams of the forward pass
    return (chosen and chosen.get(device)) or _defaults.get(device) or default_stream(device)


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    if chosen is None:
        yield
        return
    before, before_forward = getattr(_state, "streams", {}), dict(_of_forward)
    _state.streams = {**before, chosen.device: chosen}
    _of_forward[chosen.device] = chosen
    try:
        yield
    finally:
        _state.streams = before
        _of_forward.clear()
        _of_forward.update(before_forward)


def is_current_stream_capturing() -> bool:
    return current_stream() in machine.capturing


@contextmanager
def captured() -> Iterator[None]:
    """What a block queues becomes part of a graph, as in `torch.cuda.graph`: nothing runs, waits or is allocated."""
    side = Stream()
    side.wait_stream(current_stream())
    with stream(side):
        machine.capturing.add(side)
        try:
            yield
        finally:
            machine.capturing.discard(side)
    current_stream().wait_stream(side)


def look_at_capture(what: str, everywhere: bool = False) -> None:
    """Say what our code must not do while a graph is captured. everywhere: in any thread, as the global mode has it."""
    if machine.capturing and (everywhere or is_current_stream_capturing()) and waits.ours() is not None:
        found.append(f"{what} while a graph is captured, at {waits.ours()}")


def _device(device: Any) -> torch.device:
    if isinstance(device, torch.device) and device.index is not None:
        return device
    device = torch.device("fgpu" if device is None or isinstance(device, int) else device)
    return device if device.index is not None else torch.device("fgpu", current_device())


# ---- copies to the host


def copies_out(function: Any, args: Any, operands: list[Tensor]) -> bool:
    """Whether an operation is a copy to pinned memory for which nobody waits."""
    if function._schema.name != "aten::copy_" or not (len(args) > 2 and args[2]):
        return False
    return operands[0].device.type == "cpu" and operands[0].is_pinned()


def copy_out(host: Tensor, inner: Tensor, device: torch.device) -> Tensor:
    """Queue such a copy."""
    now = current_stream(device)
    point = now.point()
    look_at_capture("a copy to the host")
    memory.touch(inner, now, point, False, "a copy to the host")
    if now is not default_stream(device) and not memory.is_recorded(inner, now):
        found.append("a copy on a stream that the memory was not recorded on: it may be given away before it has run")
    now.waiting.append(Copy(point, host.as_subclass(Tensor), inner.detach()))
    machine.follow(now)
    return host


class Pinned(Tensor):
    """Host memory that a device can write to while the host goes on: a look at it sees what has arrived by then."""

    def is_pinned(self, device: Any = None) -> bool:
        return True

    def numpy(self, **_: Any) -> Any:
        seen = self.as_subclass(Tensor).numpy().copy()
        machine.go_on()
        return seen


def pinned(size: int, dtype: torch.dtype) -> Tensor:
    look_at_capture("pinned memory is allocated", everywhere=True)
    return torch.empty(size, dtype=dtype, device="cpu").as_subclass(Pinned)
