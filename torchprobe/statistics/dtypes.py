"""Which numbers a tensor holds, and in what precision and chunks they are added up.

A statistic never sees a dtype or a memory layout: `real` makes the elements ordinary real floats, `chunks` brings
as many of them as stay in cache, and results are rows of `row_dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

CPU_CHUNK = 2**18
"""Elements worked on at a time on CPU: temporaries stay in L2, and threads still meet seldom (each operation on a
chunk is a barrier, which costs milliseconds where other processes want the cores)."""

DEVICE_CHUNK = 2**24
"""The same elsewhere: few kernels, and a huge tensor costs no huge temporaries (128 MiB in float64)."""

GPUS = ("cuda", "xpu")
"""Kinds of devices with streams, and generators of their own; ROCm's are called cuda too."""

PLAIN: tuple[type[Tensor], ...] = (Tensor, torch.nn.Parameter)
"""Tensors whose elements lie where they say: no DTensor, no fake tensor, no subclass that may do as it likes."""

_PACKED = {getattr(torch, "float4_e2m1fn_x2", None)}  # two numbers a byte; from torch 2.8 on


_COMMON = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # types, of which less is asked


def row_dtype(device: torch.device) -> torch.dtype:
    """The type of accumulators and results: float64, or float32 on a device that lacks it (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def measurable(x: Tensor) -> bool:
    """Whether statistics of the elements of `x` can be computed: the functions here take such tensors, and no others.

    It is strided and holds floating or complex numbers in memory. Not so: integers and booleans, quantised ones too
    (codes, of which no norm means anything); sparse, jagged and nested tensors; what is packed in less than a byte;
    and what has a shape alone, such as fake and meta tensors and lazy parameters. Looks at no element, on any device.
    """
    if type(x) in PLAIN and x.dtype in _COMMON and x.layout is torch.strided and not x.is_nested:
        return not x.is_meta
    if is_lazy(x) or x.layout != torch.strided or x.is_nested or x.dtype in _PACKED:
        return False
    return (x.is_floating_point() or x.is_complex()) and x.untyped_storage().device.type != "meta"  # a fake one's is


def address(x: Tensor) -> int:
    """What tensors that begin in the same memory have in common; its own of one that does not say where it lies."""
    return x.data_ptr() if type(x) in PLAIN and not x.is_meta and x.numel() else id(x)


def real(x: Tensor) -> Tensor:
    """The elements of a strided tensor as real floats of 16 bits or more, detached; shares memory where it can.

    A complex tensor of shape (...,) becomes (..., 2): its real and imaginary parts are the elements, and the L2
    norm stays what it was. 8-bit floats become float32. Raises TypeError for integers and booleans.
    """
    x = x.detach() if x.requires_grad else x
    if x.dtype in _COMMON:  # most of what comes
        return x.resolve_neg()
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    if not x.is_floating_point():
        raise TypeError(f"x: got a tensor of {x.dtype}, takes a floating or complex one; convert it with x.float()")
    return x.float() if x.dtype.itemsize == 1 else x.resolve_neg()


def reals(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`real` of each."""
    return [x.resolve_neg() if x.dtype in _COMMON and not x.requires_grad else real(x) for x in tensors]


def arithmetic(x: Tensor, name: str) -> torch.dtype:
    """The type to compute in: float64 for float64, else float32. Raises TypeError for what is no real float."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: got a tensor of {x.dtype}, takes a floating one; convert it with {name}.float()")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_size(device: torch.device, elements: int) -> int:
    """How many of so many elements to work on at a time: a cache's worth on CPU, a kernel's worth elsewhere."""
    return min(elements, CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK)


class Scratch(NamedTuple):
    """Memory to work in, allocated once a call and reused: fresh pages would cost more than the arithmetic."""

    values: Tensor
    """(size,) of the narrowest type with fast vector arithmetic that holds the elements exactly."""
    wide: Tensor
    """(size,) of the row's type."""

    @classmethod
    def for_elements_of(cls, tensors: Sequence[Tensor], device: torch.device, size: int | None = None) -> Scratch:
        """Room for `size` elements of real tensors, by default a chunk."""
        size = chunk_size(device, sum([x.numel() for x in tensors])) if size is None else size
        narrow = torch.float64 not in {x.dtype for x in tensors}
        values = torch.empty(size, dtype=torch.float32 if narrow else torch.float64, device=device)
        return cls(values, torch.empty(size, dtype=row_dtype(device), device=device))

    def first(self, size: int) -> Scratch:
        """Its first `size` elements."""
        return Scratch(self.values[:size], self.wide[:size])


def chunks(x: Tensor, size: int) -> Iterable[Tensor]:
    """The elements of `x`, each once and in any order, as non-empty 1-D tensors of at most `size` elements.

    A dense tensor is not copied, whatever the order of its dimensions; another (expanded, strided) is copied one
    chunk at a time.
    """
    elements = x.numel()
    if elements <= size and x.is_contiguous():
        return () if not elements else (x,) if x.ndim == 1 else (x.view(-1),)
    return _chunks(x, size)


def _chunks(x: Tensor, size: int) -> Iterator[Tensor]:
    if x.numel() == 0:
        return
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))  # memory order
    if x.is_contiguous():
        flat = x.view(-1)
        yield from flat.split(size) if x.numel() > size else (flat,)
    elif x.numel() <= size:
        yield x.reshape(-1)
    else:
        for half in x.chunk(2, dim=max(range(x.dim()), key=x.size)):
            yield from _chunks(half, size)


def examples(x: Tensor, trailing: int) -> Iterator[Tensor]:
    """`x`, (..., the last `trailing` dimensions), as (n, those dimensions): each example once, in order.

    A chunk has a cache's worth of elements, or one example; it has none where there is none, which then needs no case
    of its own. It shares memory with `x` where strides allow, else that chunk alone is copied.
    """
    own = x.shape[x.dim() - trailing :]
    count, size = math.prod(x.shape[: x.dim() - trailing]), chunk_size(x.device, x.numel())
    if not x.numel():
        yield x.reshape(0, *own)
        return
    try:
        rows = x.view(count, *own)
    except RuntimeError:  # strides do not allow it
        if x.numel() > size and count > 1:
            for some in x if x.size(0) == 1 else x.chunk(2):
                yield from examples(some, trailing)
            return
        rows = x.reshape(count, *own)
    yield from rows.split(max(1, size // math.prod(own)))


def on_host(value: Tensor) -> float:
    """One number in host memory: nothing waits, and nothing is copied from a device."""
    return float(value.tolist())  # type: ignore[arg-type] # the way that costs least, and no operation of torch's


def moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device, without waiting for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def owners(tensors: Sequence[Tensor]) -> Tensor:
    """For each element of all tensors in host memory, one after the other, the index of its tensor: int64."""
    return torch.repeat_interleave(torch.tensor([x.numel() for x in tensors], device="cpu"))
