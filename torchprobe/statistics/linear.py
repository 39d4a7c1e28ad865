"""A histogram with equal buckets whose edges are multiples of a power of two, so that any two merge exactly.

The width of a bucket is the smallest power of two with which all finite elements fit. That depends on the smallest and
the largest element alone, and any coarser grid is made of whole buckets: `combine` gives the very histogram of all
elements together, however they were divided.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.statistics import buckets as counting
from torchprobe.statistics import dense
from torchprobe.statistics.dtypes import Scratch, chunks, on_host, owners, real

HEADER = ("low", "high", "nonfinite")
"""What stands before the counts."""

LEAST = 4
"""Buckets, at the least: two finer ones must always fit into one."""

_FINEST = 2.0**-100  # width; also where rows are float32


def linear_histogram(x: Tensor, buckets: int = 64) -> Tensor:
    """Counts of the elements of `x`: [low, high, nonfinite, one for each bucket], shape (3 + buckets,), `row_dtype`.

    `x` is any strided floating or complex tensor; low and high are its smallest and largest finite element, both 0
    if there is none. `edges` gives the bounds of the buckets, the first of which holds low; about half of them or
    more are in use. A bucket holds its lower edge. Counts are exact, and add up to the number of finite elements.
    Equal elements all are in the middle bucket.

    Makes no host read; reads the data twice. On one CPU core an element of finite float32 costs 1.8 ns of a million,
    and 2.2 of 100,000, however wide the buckets are; one of other types, or beside NaN or inf, 4.5 to 6.5 ns.
    Raises TypeError for integers and ValueError for fewer than four buckets.
    """
    return linear_histograms([x], buckets)[0]


def linear_histograms(tensors: Sequence[Tensor], buckets: int = 64) -> Tensor:
    """The row of each of many tensors of one device: shape (n, 3 + buckets). Small ones are counted together."""
    _check(buckets)
    tensors = [real(x) for x in tensors]
    if not tensors:
        return torch.zeros(0, len(HEADER) + buckets, dtype=torch.float64)
    found: dict[int, Tensor] = {}
    for pack in counting.small_packs(tensors):
        rows = _together([tensors[i] for i in pack], buckets)
        found.update((i, row) for i, row in zip(pack, rows, strict=True) if row is not None)
    return torch.stack([found[i] if i in found else _histogram(x, buckets) for i, x in enumerate(tensors)])


def _histogram(x: Tensor, buckets: int) -> Tensor:
    row = _dense(x, buckets) if dense.applies_to(x) else None
    if row is not None:
        return row
    scratch = Scratch.for_elements_of([x], x.device)
    if x.numel() == 0:
        return scratch.wide.new_zeros(len(HEADER) + buckets)
    low, high = _extremes(x, scratch)
    codes = _count(x, low, high, buckets, scratch)
    inner = torch.where(low < high, codes[:buckets], codes[:buckets].roll(buckets // 2))
    return torch.cat((torch.stack((low, high)), codes[-1:], inner)).to(scratch.wide)


def _dense(x: Tensor, buckets: int) -> Tensor | None:
    """The row of float32 elements in host memory; None when one is not finite."""
    ends = [(on_host(chunk.amin()), on_host(chunk.amax())) for chunk in chunks(x, dense.CHUNK)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if not all(math.isfinite(end) for both in ends for end in both):
        return None
    counted = torch.zeros(buckets + 1, dtype=torch.int64, device=x.device)
    if low == high:
        counted[buckets // 2] = x.numel()
    else:
        _count_between(x, low, high, counted)
    header = torch.tensor((low, high, 0.0), dtype=torch.float64, device=x.device)
    return torch.cat((header, counted[:-1].to(header)))


def _count_between(x: Tensor, low: float, high: float, counted: Tensor) -> None:
    width = _width(low, high, len(counted) - 1)
    first = math.floor(low / width)
    far = 0 if abs(first) < 2**14 else first  # what is near fits 16 bits, where taking it off is cheaper
    scratch = torch.empty(min(x.numel(), dense.CHUNK), dtype=x.dtype, device=x.device)
    for large in chunks(x, counting.COUNT_CHUNK):
        codes = torch.empty_like(large, dtype=torch.int16 if len(counted) <= 181 else torch.int32)
        for chunk, of_chunk in zip(large.split(dense.CHUNK), codes.split(dense.CHUNK), strict=True):
            floored = _floored(chunk, width, scratch[: len(chunk)])
            of_chunk.copy_(floored.sub_(far) if far else floored)
        counted += counting.count_halves(codes.sub_(first - far), len(counted))


def _floored(x: Tensor, width: float, out: Tensor) -> Tensor:
    """The largest integers that are no larger than x / width, exact in float32.

    Multiplied by a power of two of at least 1, nothing is rounded; by a smaller one, what is next to 0 could vanish,
    but not once it is an integer.
    """
    scaled = torch.mul(x, 1 / width, out=out) if width <= 1 else torch.floor(x, out=out).mul_(1 / width)
    return scaled.floor_()


def _together(tensors: Sequence[Tensor], buckets: int) -> list[Tensor | None]:
    """The rows of small float32 tensors in host memory; None for one with an element that is not finite."""
    packed = torch.cat([x.reshape(-1) for x in tensors]).double()
    lengths = torch.tensor([x.numel() for x in tensors], device="cpu")
    low, high = (torch.segment_reduce(packed, end, lengths=lengths, unsafe=True) for end in ("min", "max"))
    finite = (high - low).isfinite().numpy()
    if finite.all():
        return list(_rows(packed, owners(tensors), low, high, buckets).unbind())
    good = [x for x, fine in zip(tensors, finite, strict=True) if fine]
    rows = iter(_together(good, buckets) if good else [])
    return [next(rows) if fine else None for fine in finite]


def _rows(packed: Tensor, owner: Tensor, low: Tensor, high: Tensor, buckets: int) -> Tensor:
    """Of float64 elements and the index of the tensor that each is from: (tensors, 3 + buckets)."""
    first, per_unit = (grid.masked_fill(low == high, 0.0) for grid in _grid(low, high, buckets))
    codes = (packed * per_unit[owner]).floor_().sub_(first[owner]).long().add_(owner, alpha=buckets + 1)
    counted = torch.bincount(codes, minlength=len(low) * (buckets + 1)).view(len(low), -1)
    inner = counted[:, :-1]
    inner = torch.where((low < high)[:, None], inner, inner.roll(buckets // 2, 1))
    return torch.cat((torch.stack((low, high, torch.zeros_like(low)), dim=1), inner.to(low)), dim=1)


def edges(low: float, high: float, buckets: int = 64) -> list[float]:
    """The buckets + 1 edges of a histogram whose row begins with low and high, on the host.

    Where they are equal the edges lie around them. Raises ValueError for low > high and for fewer than four buckets.
    """
    found: list[float] = edge_array(low, high, buckets).tolist()
    return found


def edge_array(low: float, high: float, buckets: int = 64) -> NDArray[np.float64]:
    """`edges` as an array, for the many of a whole model."""
    _check(buckets)
    if not low <= high:
        raise ValueError(f"low, high: got {low} and {high}, takes low <= high, as linear_histogram returns them")
    numbers = np.arange(buckets + 1, dtype=np.int64)
    with np.errstate(over="ignore"):  # edges beyond the largest number are that
        if low == high:
            found = low + max(0.5, math.ldexp(abs(low), -10)) * (2 * numbers / buckets - 1)
        else:
            width = _width(low, high, buckets)
            found = (math.floor(low / width) + numbers) * np.float64(width)
        return np.clip(found, -sys.float_info.max, sys.float_info.max)


def combine(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The row of two tensors' elements together, from the row of each, on the host: shape (3 + buckets,).

    Exact: the same as the row of the concatenation. A row without elements is the identity, but for its non-finite.
    """
    rows = [row for row in (a, b) if row[len(HEADER) :].any()]
    low = min((float(row[0]) for row in rows), default=0.0)
    high = max((float(row[1]) for row in rows), default=0.0)
    counts = np.zeros(len(a) - len(HEADER))
    for row in rows:
        np.add.at(counts, _buckets_in(row, low, high), row[len(HEADER) :])
    return np.concatenate(([low, high, a[2] + b[2]], counts))


def _buckets_in(row: NDArray[np.float64], low: float, high: float) -> NDArray[np.int64]:
    """Where each bucket of a row lies in the grid of a range around it; anywhere for an empty one."""
    buckets = len(row) - len(HEADER)
    if low == high:
        return np.full(buckets, buckets // 2)
    width = _width(low, high, buckets)
    if row[0] == row[1]:  # its elements are all the same
        starts = np.full(buckets, row[0])
    else:
        own = _width(row[0], row[1], buckets)
        starts = (np.floor(row[0] / own) + np.arange(buckets)) * own  # exact where there are elements
    places: NDArray[np.int64] = np.clip(np.floor(starts / width) - math.floor(low / width), 0, buckets - 1).astype(int)
    return places


def _width(low: float, high: float, buckets: int) -> float:
    """The smallest power of two that holds low < high in so many buckets; the same as `_grid` on the device."""
    share = (high / 2 - low / 2) / (buckets / 2)  # high - low could overflow
    if share < _FINEST:
        return _FINEST
    mantissa, exponent = math.frexp(share)
    width = math.ldexp(1.0, exponent - (mantissa == 0.5))
    return width if math.floor(high / width) - math.floor(low / width) < buckets else 2 * width


def _grid(low: Tensor, high: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """The number of the first bucket, counted from 0, and how many buckets fit into 1. Powers of two divide exactly."""
    share = ((high / 2 - low / 2) / (buckets / 2)).clamp(min=_FINEST)
    mantissa = torch.frexp(share).mantissa
    per_unit = mantissa / share * torch.where(mantissa == 0.5, 2.0, 1.0)
    fits = torch.floor(high * per_unit) - torch.floor(low * per_unit) < buckets
    per_unit = torch.where(fits, per_unit, per_unit / 2)
    return torch.floor(low * per_unit), per_unit


def _extremes(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The smallest and the largest finite element, in the row's type."""
    lows, highs = [], []
    for chunk in chunks(x, len(scratch.values)):
        values = scratch.first(len(chunk)).values
        lows.append(values.copy_(chunk).nan_to_num_(math.inf, math.inf, math.inf).amin())
        highs.append(values.copy_(chunk).nan_to_num_(-math.inf, -math.inf, -math.inf).amax())
    low, high = torch.stack(lows).amin().to(scratch.wide), torch.stack(highs).amax().to(scratch.wide)
    return low.masked_fill(low.isinf(), 0.0), high.masked_fill(high.isinf(), 0.0)


def _count(x: Tensor, low: Tensor, high: Tensor, buckets: int, scratch: Scratch) -> Tensor:
    """Elements in each bucket, and non-finite: int64 of shape (buckets + 1,). Equal ones are in the first."""
    first, per_unit = _grid(low, high, buckets)
    equal = low == high
    first, per_unit = first.masked_fill(equal, 0.0), per_unit.masked_fill(equal, 0.0)
    codes = torch.zeros(buckets + 1, dtype=torch.int64, device=x.device)
    for chunk in chunks(x, len(scratch.values)):
        room = scratch.first(len(chunk))
        wide = room.wide.copy_(room.source(chunk))
        position = wide.mul_(per_unit).floor_().sub_(first).nan_to_num_(*3 * [float(buckets)])
        codes += counting.count_codes(position.int(), buckets + 1)
    return codes


def _check(buckets: int) -> None:
    if buckets < LEAST:
        raise ValueError(f"buckets: got {buckets}, takes {LEAST} or more")
