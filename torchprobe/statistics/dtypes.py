"""Which numbers a tensor holds, and in what precision and portions they are added up.

A statistic never sees a dtype or a memory layout: `real` makes the elements ordinary real floats, `pieces` brings
them in portions that stay in cache, and results are rows of `row_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_PIECE = 2**18
"""Elements worked on at a time on CPU: temporaries stay in L2, and threads still meet seldom (each operation on a
piece is a barrier, which costs milliseconds where other processes want the cores)."""

DEVICE_PIECE = 2**22
"""The same elsewhere: few kernels, and a huge tensor costs no huge temporaries."""


def row_dtype(device: torch.device) -> torch.dtype:
    """The type of accumulators and results: float64, or float32 on a device that lacks it (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def real(x: Tensor) -> Tensor:
    """The elements of a strided tensor as real floats of 16 bits or more, detached; shares memory where it can.

    A complex tensor of shape (...,) becomes (..., 2): its real and imaginary parts are the elements, and the L2
    norm stays what it was. 8-bit floats become float32. Raises TypeError for integers and booleans.
    """
    x = x.detach()
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    if not x.is_floating_point():
        raise TypeError(f"x: got a tensor of {x.dtype}, takes a floating or complex one; convert it with x.float()")
    return x.float() if x.dtype.itemsize == 1 else x.resolve_neg()


def working_dtype(x: Tensor) -> torch.dtype:
    """The narrowest type with fast vector arithmetic that holds each element of a real `x` exactly."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def piece_size(x: Tensor) -> int:
    """How many elements of `x` to work on at a time."""
    return min(x.numel(), CPU_PIECE if x.device.type == "cpu" else DEVICE_PIECE)


def pieces(x: Tensor, size: int) -> Iterator[Tensor]:
    """The elements of `x`, each once and in any order, as non-empty 1-D tensors of at most `size` elements.

    A dense tensor is not copied, whatever the order of its dimensions; another (expanded, strided) is copied one
    piece at a time.
    """
    x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))  # memory order
    if x.is_contiguous():
        yield from x.view(-1).split(size) if x.numel() else ()
    elif x.numel() <= size:
        yield x.reshape(-1)
    else:
        for half in x.chunk(2, dim=max(range(x.dim()), key=x.size)):
            yield from pieces(half, size)
