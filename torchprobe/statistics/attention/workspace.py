"""Memory to work in, taken once a call and reused: fresh pages would cost more than the arithmetic in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """A block's worth of logits and one of weights, each overwritten by the next block's."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """size: elements of a usual block; a larger one grows it."""
        self._buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        self.zero = torch.zeros(1, 1, 1, dtype=dtype, device=device)

    def logits(self, shape: Sequence[int]) -> Tensor:
        """Room for the logits of a block."""
        return self._room(0, shape)

    def weights(self, shape: Sequence[int]) -> Tensor:
        """Room for the weights that are made of them."""
        return self._room(1, shape)

    def _room(self, index: int, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        if self._buffers[index].numel() < size:
            self._buffers[index] = self._buffers[index].new_empty(size)
        return self._buffers[index][:size].view(shape)
