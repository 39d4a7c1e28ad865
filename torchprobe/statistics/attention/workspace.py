"""Memory to work in, taken once a call and reused: fresh pages would cost more than the arithmetic in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """A block's worth of logits and one of weights, and a head's keys, each overwritten by the next."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """size: elements of a usual block; a larger one grows it."""
        self._buffers = [torch.empty(n, dtype=dtype, device=device) for n in (size, size, 0)]
        self._rooms: tuple[dict[tuple[int, ...], Tensor], ...] = ({}, {}, {})
        self.zero = torch.zeros(1, 1, 1, dtype=dtype, device=device)

    def logits(self, shape: tuple[int, ...]) -> Tensor:
        """Room for the logits of a block."""
        return self._room(0, shape)

    def weights(self, shape: tuple[int, ...]) -> Tensor:
        """Room for the weights that are made of them."""
        return self._room(1, shape)

    def keys(self, key: Tensor) -> Tensor:
        """The keys of some heads, contiguous and in the type of the arithmetic: a copy, unless they are."""
        if key.dtype == self.zero.dtype and key.is_contiguous():
            return key
        return self._room(2, tuple(key.shape)).copy_(key)

    def _room(self, index: int, shape: tuple[int, ...]) -> Tensor:
        found = self._rooms[index].get(shape)
        return self._make(index, shape) if found is None else found

    def _make(self, index: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._buffers[index].numel() < size:
            self._buffers[index] = self._buffers[index].new_empty(size)
            self._rooms[index].clear()  # or they would keep the smaller buffer
        room = self._buffers[index][:size].view(shape)
        self._rooms[index][shape] = room
        return room
