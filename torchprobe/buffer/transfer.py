"""One device's way to the host: preallocated slots, given out in order, and asynchronous copies out of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.statistics.dtypes import row_dtype

# Devices with streams and pinned host memory, and how to make an event whose waiter sleeps instead of spinning.
_EVENT_OPTIONS: dict[str, dict[str, bool]] = {"cuda": {"blocking": True}, "xpu": {}}


def records_graph(device: torch.device) -> bool:
    """Whether the user is recording the device's work as a graph: what is queued now would become part of it."""
    if device.type not in _EVENT_OPTIONS:
        return False
    # Missing for xpu in older versions, which record no graphs.
    asked = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return asked is not None and bool(asked())


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
        self, host: Tensor, shapes: Sequence[torch.Size], wait: Callable[[], Any], free: Callable[[], None]
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


class TransferBuffer:
    """Sends rows of one device to the host without making the training thread wait.

    capacity: elements that can be under way; a send that does not fit is refused. Costs 8 bytes an element
    (4 on mps) on the device, and as many of pinned host memory where copies overlap with computation.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        self.capacity = capacity
        self._ring = Ring(capacity)
        self._device = device
        self._overlaps = device.type in _EVENT_OPTIONS
        with torch.inference_mode(False):  # the slots outlive the mode they are made in
            self._slots = torch.empty(capacity, dtype=row_dtype(device), device=device)
            if self._overlaps:
                self._module = torch.get_device_module(device)
                self._stream = self._module.Stream(device)
                self._slots.record_stream(self._stream)  # no reuse of the memory before the last copy out of it
                # The device is named because the user may have set another default.
                self._host = torch.empty(capacity, dtype=self._slots.dtype, device="cpu", pin_memory=True)

    @property
    def crowded(self) -> bool:
        """Whether the drain thread had better wake up."""
        return self._ring.crowded

    def send(self, rows: Sequence[Tensor]) -> Transfer | None:
        """Start the copy of rows of any shapes and real types. One concatenation, one copy; no host read.

        None when there is no room. Raises what `torch.cat` raises; then the room is free again.
        """
        size = sum(map(Tensor.numel, rows))
        start = self._ring.reserve(size)
        if start is None:
            return None
        try:
            host, wait = self._copy(rows, start, start + size)
        except BaseException:
            self._ring.cancel()
            raise
        return Transfer(host, [row.shape for row in rows], wait, self._ring.release)

    def _copy(self, rows: Sequence[Tensor], start: int, end: int) -> tuple[Tensor, Callable[[], Any]]:
        slot = self._slots[start:end]
        if rows:
            torch.cat([row.reshape(-1) for row in rows], out=slot)
        if not self._overlaps:
            return slot, lambda: None
        host = self._host[start:end]
        return host, self._copy_aside(slot, host).synchronize

    def _copy_aside(self, slot: Tensor, host: Tensor) -> Any:
        done = self._module.Event(**_EVENT_OPTIONS[self._device.type])
        with self._module.stream(self._stream):
            self._stream.wait_stream(self._module.current_stream(self._device))
            host.copy_(slot, non_blocking=True)
            done.record(self._stream)
        return done
