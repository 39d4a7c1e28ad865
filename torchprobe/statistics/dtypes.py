"""Which numbers a tensor holds, and in what precision and portions they are added up.

A statistic never sees a dtype or a memory layout: `real` makes the elements ordinary real floats, `pieces` brings
them in portions that stay in cache, and results are rows of `row_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    if x.dtype == torch.float32:  # most of what comes
        return x.resolve_neg()
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    if not x.is_floating_point():
        raise TypeError(f"x: got a tensor of {x.dtype}, takes a floating or complex one; convert it with x.float()")
    return x.float() if x.dtype.itemsize == 1 else x.resolve_neg()


def piece_size(device: torch.device, elements: int) -> int:
    """How many of so many elements to work on at a time: a cache's worth on CPU, a kernel's worth elsewhere."""
    return min(elements, CPU_PIECE if device.type == "cpu" else DEVICE_PIECE)


class Scratch(NamedTuple):
    """Memory to work in, allocated once a call and reused: fresh pages would cost more than the arithmetic."""

    values: Tensor
    """(size,) of the narrowest type with fast vector arithmetic that holds the elements exactly."""
    wide: Tensor
    """(size,) of the row's type."""

    @classmethod
    def for_elements_of(cls, tensors: Sequence[Tensor], device: torch.device) -> Scratch:
        """Room for one piece of real tensors."""
        return cls.of_size(piece_size(device, sum(x.numel() for x in tensors)), tensors, device)

    @classmethod
    def of_size(cls, size: int, tensors: Sequence[Tensor], device: torch.device) -> Scratch:
        """Room for `size` elements of real tensors."""
        narrow = all(x.dtype != torch.float64 for x in tensors)
        values = torch.empty(size, dtype=torch.float32 if narrow else torch.float64, device=device)
        return cls(values, torch.empty(size, dtype=row_dtype(device), device=device))

    def part(self, size: int) -> Scratch:
        """Its first `size` elements."""
        return Scratch(self.values[:size], self.wide[:size])

    def source(self, x: Tensor) -> Tensor:
        """1-D `x`, as long as this scratch, in the type of `values`: copied there only if it is of another type."""
        return x if x.dtype == self.values.dtype else self.values.copy_(x)


def pieces(x: Tensor, size: int) -> Iterator[Tensor]:
    """The elements of `x`, each once and in any order, as non-empty 1-D tensors of at most `size` elements.

    A dense tensor is not copied, whatever the order of its dimensions; another (expanded, strided) is copied one
    piece at a time.
    """
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))  # memory order
    if x.is_contiguous():
        yield from _cut(x.view(-1), size)
    elif x.numel() <= size:
        yield x.reshape(-1)
    else:
        for half in x.chunk(2, dim=max(range(x.dim()), key=x.size)):
            yield from pieces(half, size)


def on_host(value: Tensor) -> float:
    """One number in host memory: nothing waits, and nothing is copied from a device."""
    return float(value.numpy())


def owners(tensors: Sequence[Tensor]) -> Tensor:
    """For each element of all tensors in host memory, one after the other, the index of its tensor: int64."""
    lengths = torch.tensor([x.numel() for x in tensors], device="cpu")
    return torch.repeat_interleave(lengths)


def in_order(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Rows at their places: 0 ... n - 1, each in one part, whose rows are of shape (places, width)."""
    if len(parts) == 1:
        return parts[0][1]
    rows = {place: row for places, found in parts for place, row in zip(places, found.unbind(), strict=True)}
    return torch.stack([rows[place] for place in range(len(rows))])


def _cut(x: Tensor, size: int) -> Iterator[Tensor]:
    if x.numel() > size:
        yield from x.split(size)
    elif x.numel():
        yield x


def measurable(tensor: Tensor) -> bool:
    """Whether statistics can be computed of a tensor."""
    return (
        (tensor.is_floating_point() or tensor.is_complex())
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.device.type != "meta"
    )
