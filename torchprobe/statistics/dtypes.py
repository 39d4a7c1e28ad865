"""Which numbers a tensor holds, and in what precision they are added up.

A statistic never sees a dtype: `real` makes the elements ordinary real floats, `pieces` brings them in
portions that stay in cache, and results are rows of `row_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_PIECE_PER_THREAD = 2**16
"""Elements a thread works on at a time: the float64 temporaries of one operation then fit in L2."""

LARGEST_PIECE = 2**22
"""No statistic allocates temporaries of more elements than this, so a huge tensor costs no huge memory."""


def row_dtype(device: torch.device) -> torch.dtype:
    """The type statistics are accumulated and returned in: float64, or float32 where a device lacks it (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def real(x: Tensor) -> Tensor:
    """The elements of `x` as real floats of at least 16 bits, detached; shares memory where it can.

    A complex tensor of shape (...,) becomes (..., 2): its real and imaginary parts count as elements, and the
    L2 norm stays what it was. 8-bit floats become float32. Raises TypeError for integers and booleans.
    """
    x = x.detach()
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    if not x.is_floating_point():
        raise TypeError(f"x: got a tensor of {x.dtype}, takes a floating or complex one; convert with x.float()")
    return x.float() if x.dtype.itemsize == 1 else x.resolve_neg()


def widened(x: Tensor) -> Tensor:
    """`x` with 16-bit floats as float32, which holds each of them exactly; wider ones as they are."""
    return x.float() if x.dtype.itemsize < 4 else x


def piece_size(device: torch.device) -> int:
    """How many elements to work on at once: a cache's worth on CPU, a kernel's worth elsewhere."""
    if device.type != "cpu":
        return LARGEST_PIECE
    return min(LARGEST_PIECE, CPU_PIECE_PER_THREAD * torch.get_num_threads())


def pieces(x: Tensor, size: int) -> Iterator[Tensor]:
    """The elements of `x`, each exactly once and in any order, as non-empty 1-D tensors of at most `size`.

    Dense tensors are not copied, whatever the order of their dimensions; others (expanded, strided) are copied
    one piece at a time.
    """
    x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))  # memory order
    if x.is_contiguous():
        yield from x.view(-1).split(size) if x.numel() else ()
    elif x.numel() <= size:
        yield x.reshape(-1)
    else:
        for half in x.chunk(2, dim=max(range(x.dim()), key=x.size)):
            yield from pieces(half, size)
