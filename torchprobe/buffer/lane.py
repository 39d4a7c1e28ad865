"""One device's way to the host: a preallocated slot, an asynchronous copy, a ticket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.buffer.ring import Ring
from torchprobe.statistics.dtypes import row_dtype

_OVERLAPPING = ("cuda", "xpu")  # devices with streams and pinned host memory


class Ticket:
    """A copy under way. `take` is for the drain thread: it may wait for the device."""

    def __init__(
        self, host: Tensor, shapes: Sequence[torch.Size], wait: Callable[[], Any], free: Callable[[], None]
    ) -> None:
        self._host = host
        self._shapes = shapes
        self._wait = wait
        self._free = free

    def take(self) -> list[NDArray[np.float64]]:
        """The rows as host arrays. Frees the slot; call it once, in the order of sending."""
        try:
            self._wait()
            flat = self._host.to("cpu", torch.float64, copy=True).numpy()
        finally:
            self._free()
        ends = np.cumsum([shape.numel() for shape in self._shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), self._shapes, strict=True)]


class Lane:
    """Sends rows of one device to the host without making the training thread wait.

    capacity: elements that can be under way; a send that does not fit is refused.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        self._ring = Ring(capacity)
        self._device = device
        self._slots = torch.empty(capacity, dtype=row_dtype(device), device=device)
        self._overlaps = device.type in _OVERLAPPING
        if self._overlaps:
            self._module = torch.get_device_module(device)
            self._stream = self._module.Stream(device)
            self._host = torch.empty(capacity, dtype=self._slots.dtype, pin_memory=True)

    @property
    def crowded(self) -> bool:
        """Whether the drain thread had better wake up."""
        return self._ring.crowded

    def send(self, rows: Sequence[Tensor]) -> Ticket | None:
        """Start the copy of rows of any shapes; None when there is no room. One concatenation."""
        size = sum(row.numel() for row in rows)
        start = self._ring.reserve(size)
        if start is None:
            return None
        slot = self._slots[start : start + size]
        torch.cat([row.reshape(-1) for row in rows], out=slot)
        host, wait = self._copy_out(slot, start)
        return Ticket(host, [row.shape for row in rows], wait, self._ring.release)

    def _copy_out(self, slot: Tensor, start: int) -> tuple[Tensor, Callable[[], Any]]:
        if not self._overlaps:
            return slot, lambda: None
        host = self._host[start : start + slot.numel()]
        done = self._module.Event()
        with self._module.stream(self._stream):
            self._stream.wait_stream(self._module.current_stream(self._device))
            host.copy_(slot, non_blocking=True)
            done.record(self._stream)
        return host, done.synchronize
