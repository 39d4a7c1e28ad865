"""Examples in portions: what runs over the classes of each example works on a cache's worth at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchprobe.statistics.dtypes import piece_size


def arithmetic(x: Tensor, name: str) -> torch.dtype:
    """The type to compute in: float64 for float64, else float32. Raises TypeError for what is no real float."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: got a tensor of {x.dtype}, takes a floating one; convert it with {name}.float()")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def portions(x: Tensor, trailing: int) -> Iterator[Tensor]:
    """`x`, (..., the last `trailing` dimensions), as (n, those dimensions): each example once, in order.

    A portion has a cache's worth of elements, or one example. It shares memory with `x` where strides allow, else
    that portion alone is copied.
    """
    own = x.shape[x.dim() - trailing :]
    examples, size = math.prod(x.shape[: x.dim() - trailing]), piece_size(x.device, x.numel())
    if 0 in (examples, *own):
        return
    try:
        rows = x.view(examples, *own)
    except RuntimeError:  # strides do not allow it
        if x.numel() > size and examples > 1:
            for part in x if x.size(0) == 1 else x.chunk(2):
                yield from portions(part, trailing)
            return
        rows = x.reshape(examples, *own)
    yield from rows.split(max(1, size // math.prod(own)))
