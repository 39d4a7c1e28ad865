"""The memory of the device that is not there: who has touched it last, on which stream."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tests.device.streams import Stream

found: list[str] = []
"""What was not ordered, or done while a graph was captured, since the last test."""


class Memory:
    """Who has touched which elements of a storage, last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        self._accesses: dict[int, list[tuple[int, int, Stream, int, bool]]] = {}
        self._recorded: set[tuple[int, Stream]] = set()
        self._host: defaultdict[Stream, int] = defaultdict(int)  # what the host has waited for

    def record_stream(self, inner: Tensor, stream: Stream) -> None:
        self._recorded.add((storage_of(inner), stream))

    def is_recorded(self, inner: Tensor, stream: Stream) -> bool:
        return (storage_of(inner), stream) in self._recorded

    def host_waited(self, seen: dict[Stream, int]) -> None:
        with self.lock:
            for stream, point in seen.items():
                self._host[stream] = max(self._host[stream], point)

    def is_new(self, inner: Tensor, storage: int, stream: Stream, point: int) -> None:
        """Memory that was given out just now."""
        self._accesses[storage] = [(*_range(inner), stream, point, True)]

    def touch(self, inner: Tensor, stream: Stream, point: int, writes: bool, what: str) -> None:
        """An operation reads or writes a tensor."""
        low, high = _range(inner)
        if low == high:
            return
        storage = storage_of(inner)
        with self.lock:
            kept = []
            for access in self._accesses.get(storage, ()):
                start, end, other, at, wrote = access
                if end <= low or high <= start:
                    kept.append(access)
                    continue
                if other is stream or at <= max(stream.seen[other], self._host[other]):  # ordered
                    if writes and not wrote:
                        other.keep_source(at)
                elif writes or wrote:
                    verb = "writes" if writes else "reads"
                    before = "wrote" if wrote else "reads"
                    found.append(f"{what} {verb} what another stream {before}, and is not ordered after it")
                covered = low <= start and end <= high
                again = other is stream and wrote == writes and start == low and end == high
                if not again and not (writes and covered):
                    kept.append(access)
            kept.append((low, high, stream, point, writes))
            self._accesses[storage] = kept


def storage_of(inner: Tensor) -> int:
    return inner.untyped_storage()._cdata


def _range(inner: Tensor) -> tuple[int, int]:
    count = inner.numel()
    if not count:
        return 0, 0
    start, size = inner.storage_offset(), inner.itemsize
    if inner.is_contiguous():
        return start * size, (start + count) * size
    last = sum((size - 1) * stride for size, stride in zip(inner.shape, inner.stride(), strict=True))
    return start * size, (start + last + 1) * size


memory = Memory()
