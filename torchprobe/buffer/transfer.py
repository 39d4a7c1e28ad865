"""One device's way to the host: preallocated slots, given out in order, and asynchronous copies out of them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic, sleep

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.messages import log as _log
from torchprobe.statistics.dtypes import GPUS, row_dtype

OVERLAPPING = frozenset(GPUS)
"""Devices with streams and pinned host memory, whose copies overlap with computation."""

PATIENCE = 300.0
"""Seconds without any copy of a device arriving, after which it counts as lost."""

_FIRST_LOOK, _LAST_LOOK = 1e-4, 0.01  # seconds between looks whether a copy has arrived


def records_graph(device: torch.device | None = None) -> bool:
    """Whether the user captures this thread's work as a graph: what is queued now would become part of it.

    device: ask for that one alone, not for all. Costs 0.3 us, and starts no device.
    """
    kinds = OVERLAPPING if device is None else OVERLAPPING.intersection([device.type])
    return any([started() and asked() for started, asked in _capturing(kinds)])  # noqa: C419 - a generator costs a call


def may_record_graphs() -> bool:
    """Whether there is a kind of device here that records graphs at all, as is not asked at every event."""
    return bool(_capturing(OVERLAPPING))


@functools.cache
def _capturing(kinds: frozenset[str]) -> list[tuple[Callable[[], bool], Callable[[], bool]]]:
    """For each kind of device that this torch has: whether it was started, and whether its stream captures."""
    modules = [getattr(torch, kind) for kind in kinds if hasattr(torch, kind) and _is_built(kind)]
    # Older versions of torch lack the second for xpu, which captures no graphs there.
    return [
        (m.is_initialized, m.is_current_stream_capturing) for m in modules if hasattr(m, "is_current_stream_capturing")
    ]


def _is_built(kind: str) -> bool:
    built = getattr(getattr(torch.backends, kind, None), "is_built", None)
    there = built or getattr(getattr(torch, kind), "is_available", None)
    return there is None or bool(there())


def pinned(size: int, dtype: torch.dtype) -> Tensor:
    """Host memory that a device writes to by itself. The device is named, since the user may have set a default."""
    return torch.empty(size, dtype=dtype, device="cpu", pin_memory=True)


class Ring:
    """Contiguous ranges of a buffer of `capacity` elements, first in, first out.

    Another thread may call `release`, and only that. No lock is shared, so that neither waits for the other.
    A range of up to half of what is free always finds room; a larger one if it does so in one run.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # (start, end) of the ranges that are out, oldest first. Positions count on beyond the end of the
        # buffer; modulo capacity they are places in it.
        self._out: deque[tuple[int, int]] = deque()

    def reserve(self, size: int) -> int | None:
        """The start of a free range of `size` elements, or None when there is no room."""
        oldest, start = self._span()
        if start % self.capacity + size > self.capacity:
            start += self.capacity - start % self.capacity
        if start + size > oldest + self.capacity:
            return None
        self._out.append((start, start + size))
        return start % self.capacity

    def cancel(self) -> None:
        """Undo the last `reserve`, before another thread hears of the range."""
        self._out.pop()

    def release(self) -> None:
        """Give back the range that was reserved first."""
        self._out.popleft()

    @property
    def crowded(self) -> bool:
        """Whether more than half of the buffer is taken: time to drain."""
        oldest, newest = self._span()
        return 2 * (newest - oldest) > self.capacity

    def _span(self) -> tuple[int, int]:
        """Where the ranges that are out begin and end; with none, positions start anew."""
        try:
            return self._out[0][0], self._out[-1][1]
        except IndexError:
            return 0, 0


class Transfer:
    """A copy under way. `take` is for the drain thread: it may wait for the device."""

    def __init__(
        self, host: Tensor, shapes: Sequence[torch.Size], wait: Callable[[], None], free: Callable[[], None]
    ) -> None:
        self._host = host
        self._shapes = shapes
        self._wait = wait
        self._free = free

    def take(self) -> list[NDArray[np.float64]]:
        """The rows as host arrays of their own. Frees the slot even when it raises what the device raised.

        Call it once, in the order of sending.
        """
        try:
            self._wait()
            # numpy copies on this thread alone. A torch copy of this size would start OpenMP threads of its own, and
            # with more of these than cores libgomp puts the training thread's to sleep after every operation.
            flat = self._host.cpu().numpy().astype(np.float64)
        finally:
            self._free()
        ends = np.cumsum([shape.numel() for shape in self._shapes], dtype=np.int64)
        arrays = np.split(flat, ends)[:-1]  # what is behind the last end is empty
        return [array.reshape(shape) for array, shape in zip(arrays, self._shapes, strict=True)]


class CopyStream:
    """Copies out of a device's slots into pinned memory, on a stream of their own, and how many have arrived.

    The device counts them itself, in host memory, so that who waits makes no call to its driver: in another thread
    such a call breaks the graph that the user captures, and on a lost device it may never return.
    """

    def __init__(self, device: torch.device, slots: Tensor) -> None:
        self.lost = False
        """Whether the device was given up: nothing that is sent to it comes back."""
        self._device = device
        self._slots = slots
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self._sent = 0
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        for memory in (slots, self._count):
            memory.record_stream(self._stream)  # no reuse of it before the last copy out of it
        self._host = pinned(len(slots), slots.dtype)
        self._arrived = pinned(1, torch.int64).zero_()

    def copy(self, start: int, end: int) -> tuple[Tensor, Callable[[], None]]:
        """Start a copy of what the current stream computes: where it will be, and how to wait for it."""
        computing, host = self._module.current_stream(self._device), self._host[start:end]
        with self._module.stream(self._stream):
            self._stream.wait_stream(computing)
            host.copy_(self._slots[start:end], non_blocking=True)
            self._arrived.copy_(self._count.add_(1), non_blocking=True)
        self._sent = number = self._sent + 1
        return host, lambda: self._wait(number)

    def _wait(self, number: int) -> None:
        """Wait until so many copies have arrived. Raises RuntimeError once the device counts as lost."""
        pause, seen, since = _FIRST_LOOK, -1, monotonic()
        while (arrived := int(self._arrived.numpy()[0])) < number:  # in host memory
            if arrived > seen:
                seen, since = arrived, monotonic()
            if self.lost or monotonic() - since > PATIENCE:
                self._give_up()
                raise RuntimeError(f"{self._device} is lost: what was sent to the host does not arrive")
            sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)

    def _give_up(self) -> None:
        if not self.lost:
            self.lost = True
            _log.error("no copy from %s has arrived for %g s: it counts as lost", self._device, PATIENCE)


class TransferBuffer:
    """Sends rows of one device to the host without making the training thread wait.

    capacity: elements that can be under way; a send that does not fit is refused. Costs 8 bytes an element
    (4 on mps) on the device, and as many of pinned host memory where copies overlap with computation.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        self.capacity = capacity
        self._ring = Ring(capacity)
        with torch.inference_mode(False):  # the slots outlive the mode they are made in
            self._slots = torch.empty(capacity, dtype=row_dtype(device), device=device)
            self._aside = CopyStream(device, self._slots) if device.type in OVERLAPPING else None

    @property
    def crowded(self) -> bool:
        """Whether the drain thread had better wake up."""
        return self._ring.crowded

    def send(self, rows: Sequence[Tensor]) -> Transfer | None:
        """Start the copy of rows of any shapes and real types. One concatenation, one copy; no host read.

        None when there is no room, or the device is lost. Raises what `torch.cat` raises; then the room is free again.
        """
        size = sum(map(Tensor.numel, rows))
        start = None if self._aside is not None and self._aside.lost else self._ring.reserve(size)
        if start is None:
            return None
        try:
            host, wait = self._copy(rows, start, start + size)
        except BaseException:
            self._ring.cancel()
            raise
        return Transfer(host, [row.shape for row in rows], wait, self._ring.release)

    def _copy(self, rows: Sequence[Tensor], start: int, end: int) -> tuple[Tensor, Callable[[], None]]:
        slot = self._slots[start:end]
        if rows:
            torch.cat([row.reshape(-1) for row in rows], out=slot)
        if self._aside is not None:
            return self._aside.copy(start, end)
        return slot, lambda: None  # the device works in the order of its one queue
