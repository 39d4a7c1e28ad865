"""Histograms that any two tensors' merge exactly: of magnitudes by power of two, and of values in equal buckets.

The first read the exponent bits: a logarithmic histogram without a logarithm. Edges of the others are multiples of a
power of two, the smallest with which all finite elements fit. That depends on the smallest and the largest element
alone, and any coarser grid is made of whole buckets: `combine` gives the very histogram of all elements together,
however they were divided.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torchprobe.statistics import buckets as counting
from torchprobe.statistics import dense, fused
from torchprobe.statistics.dtypes import Scratch, chunk_size, chunks, on_host, owners, reals, row_dtype

LOW, HIGH = -100, 27
"""The first and the last bucket hold 2**LOW <= |x| < 2**(LOW + 1) and 2**HIGH <= |x| < 2**(HIGH + 1), and all that
lies beyond: smaller but not zero, or larger but finite."""

BUCKETS = HIGH - LOW + 1

_CODES, _BIAS = 2**8, 127
"""Exponent codes of float32: the first is for zero and subnormals, the last for inf and NaN, `_BIAS` for 2**0."""


def log_histogram(x: Tensor) -> Tensor:
    """Counts of the elements of `x`: [zeros, nonfinite, one for each bucket], shape (2 + BUCKETS,), `row_dtype`.

    `x` is any strided floating or complex tensor. Counts are exact, and zeros and buckets add up to the number of
    finite elements. Histograms of two tensors merge by addition. Makes no host read, keeps temporaries below about
    2**22 elements, and costs 2 ns an element of a million of float32 on one CPU core. Raises TypeError for integers.
    """
    return log_histograms([x])[0]


def log_histograms(tensors: Sequence[Tensor]) -> Tensor:
    """The row of each of many tensors of one device: shape (n, 2 + BUCKETS). Small ones are counted together."""
    tensors = reals(tensors)
    if not tensors:
        return torch.zeros(0, 2 + BUCKETS, dtype=torch.float64)
    if fused.applies_to(*tensors):
        counts = fused.codes(tensors)
        return _buckets(counts[:, :_CODES], counts[:, _CODES])
    found: dict[int, Tensor] = {}
    for pack in counting.small_packs(tensors):
        found.update(zip(pack, _buckets(*_counted_together([tensors[i] for i in pack])), strict=True))
    if rest := [i for i in range(len(tensors)) if i not in found]:
        codes, nonzero = zip(*(_counted(tensors[i]) for i in rest), strict=True)
        found.update(zip(rest, _buckets(torch.stack(codes), torch.stack(nonzero)), strict=True))
    return torch.stack([found[i] for i in range(len(tensors))])


def log_edges() -> list[float]:
    """log10 of the edges of the buckets: BUCKETS + 1 of them."""
    return [math.log10(2.0) * exponent for exponent in range(LOW, HIGH + 2)]


def _counted_together(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exponent codes and non-zero elements of small float32 tensors: shapes (n, 256) and (n,)."""
    packed = torch.cat([x.reshape(-1) for x in tensors])
    owner = owners(tensors)
    codes = _exponents(packed).long().add_(owner, alpha=_CODES)
    found = torch.bincount(codes, minlength=len(tensors) * _CODES).view(-1, _CODES)
    return found, torch.bincount(owner[packed != 0], minlength=len(tensors))


def _counted(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of one tensor: shapes (256,) and ()."""
    codes = torch.zeros(_CODES, dtype=torch.int64, device=x.device)
    nonzero = torch.zeros((), dtype=torch.int64, device=x.device)
    for chunk in chunks(x, chunk_size(x.device, x.numel())):
        found = counting.count_codes(_exponents(chunk), _CODES)
        codes += found
        none = dense.is_plain(x) and not on_host(found[0])  # neither zeros nor subnormals: no pass over it for them
        nonzero += chunk.shape[0] if none else chunk.count_nonzero()
    return codes, nonzero


def _exponents(x: Tensor) -> Tensor:
    """The exponent code of each element, uint8: float64 beyond float32's range has that of its ends."""
    if x.dtype == torch.float64:
        codes = torch.frexp(x).exponent.add_(_BIAS - 1).clamp_(1, _CODES - 2)
        return codes.masked_fill_(x == 0, 0).masked_fill_(~x.isfinite(), _CODES - 1).to(torch.uint8)
    return (x.float().view(torch.int32) >> 23).to(torch.uint8)  # which drops the sign above the exponent


def _buckets(codes: Tensor, nonzero: Tensor) -> Tensor:
    """Rows, (n, 2 + BUCKETS), from float32's codes, (n, 256), and non-zero elements, (n,)."""
    zeros = codes.sum(1) - nonzero
    first, end = LOW + _BIAS, HIGH + _BIAS + 1
    inner = codes[:, first:end].clone()
    inner[:, 0] += codes[:, :first].sum(1) - zeros
    inner[:, -1] += codes[:, end:-1].sum(1)
    return torch.cat((zeros[:, None], codes[:, -1:], inner), dim=1).to(row_dtype(codes.device))


# ---- of values

HEADER = ("low", "high", "nonfinite")
"""What stands before the counts."""

LEAST = 4
"""Buckets, at the least: two finer ones must always fit into one."""

_FINEST = 2.0**-100  # width; also where rows are float32


def linear_histogram(x: Tensor, buckets: int = 64) -> Tensor:
    """Counts of the elements of `x`: [low, high, nonfinite, one for each bucket], shape (3 + buckets,), `row_dtype`.

    `x` is any strided floating or complex tensor; low and high are its smallest and largest finite element, both 0
    if there is none. `linear_edges` gives the bounds of the buckets, the first of which holds low; about half of them
    or more are in use. A bucket holds its lower edge. Counts are exact, and add up to the number of finite elements.
    Equal elements all are in the middle bucket.

    Makes no host read; reads the data twice. On one CPU core an element of a million of float32 costs 5 ns. Raises
    TypeError for integers and ValueError for fewer than four buckets.
    """
    return linear_histograms([x], buckets)[0]


def linear_histograms(tensors: Sequence[Tensor], buckets: int = 64) -> Tensor:
    """The row of each of many tensors of one device: shape (n, 3 + buckets). Small ones are counted together."""
    _check(buckets)
    tensors = reals(tensors)
    if not tensors:
        return torch.zeros(0, len(HEADER) + buckets, dtype=torch.float64)
    if buckets.bit_count() == 1 and fused.applies_to(*tensors):
        return _fused(tensors, buckets)
    found: dict[int, Tensor] = {}
    for pack in counting.small_packs(tensors):
        found.update(zip(pack, _together([tensors[i] for i in pack], buckets), strict=True))
    return torch.stack([found[i] if i in found else _histogram(x, buckets) for i, x in enumerate(tensors)])


def _fused(tensors: Sequence[Tensor], buckets: int) -> Tensor:
    """The rows of tensors on a GPU, in two reads."""
    low, high = fused.rows(tensors)[:, fused.ENDS].unbind(1)
    grid = torch.stack(_grid(low, high, buckets), dim=1)
    return _row(low, high, fused.counts(tensors, grid, buckets))


def _histogram(x: Tensor, buckets: int) -> Tensor:
    scratch = Scratch.for_elements_of([x], x.device)
    if x.numel() == 0:
        return scratch.wide.new_zeros(len(HEADER) + buckets)
    low, high = _extremes(x, scratch)
    first, per_unit = _grid(low, high, buckets)
    counted = torch.zeros(buckets + 1, dtype=torch.int64, device=x.device)
    for chunk in chunks(x, scratch.values.shape[0]):
        codes = _codes(scratch.first(chunk.shape[0]).values.copy_(chunk), first, per_unit, buckets)
        counted += counting.count_codes(codes, buckets + 1)
    return _row(low, high, counted)


def _together(tensors: Sequence[Tensor], buckets: int) -> Sequence[Tensor]:
    """The rows of small float32 tensors in host memory."""
    packed, owner = torch.cat([x.reshape(-1) for x in tensors]).double(), owners(tensors)
    lengths = torch.tensor([x.numel() for x in tensors], device="cpu")
    low, high = (
        _finite(torch.segment_reduce(packed.nan_to_num(*3 * [far]), end, lengths=lengths, unsafe=True))
        for end, far in (("min", math.inf), ("max", -math.inf))
    )
    first, per_unit = _grid(low, high, buckets)
    codes = _codes(packed, first[owner], per_unit[owner], buckets).long().add_(owner, alpha=buckets + 1)
    counted = torch.bincount(codes, minlength=len(tensors) * (buckets + 1)).view(len(tensors), -1)
    return _row(low, high, counted).unbind()


def _extremes(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The smallest and the largest finite element, in the row's type."""
    if dense.is_plain(x):  # in host memory a look is free
        low, high = x.aminmax()
        if math.isfinite(on_host(low)) and math.isfinite(on_host(high)):
            return low.to(scratch.wide), high.to(scratch.wide)
    lows, highs = [], []
    for chunk in chunks(x, scratch.values.shape[0]):
        values = scratch.first(chunk.shape[0]).values
        lows.append(torch.nan_to_num(values.copy_(chunk), *3 * [math.inf], out=values).amin())
        highs.append(torch.nan_to_num(values.copy_(chunk), *3 * [-math.inf], out=values).amax())
    low, high = torch.stack(lows).amin(), torch.stack(highs).amax()
    return _finite(low).to(scratch.wide), _finite(high).to(scratch.wide)


def _finite(end: Tensor) -> Tensor:
    """The extremes, 0 where no element is finite."""
    return end.masked_fill(end.isinf(), 0.0)


def _codes(values: Tensor, first: Tensor, per_unit: Tensor, buckets: int) -> Tensor:
    """The bucket of each element; the last one, `buckets`, for what is not finite. Overwrites `values`.

    Products with powers of two of at least 1 are exact, and so are integers' with smaller ones; others may vanish at 0.
    """
    scaled = values.mul_(per_unit.clamp(min=1)).floor_().mul_(per_unit.clamp(max=1)).floor_()
    whole = scaled.sub_(first).nan_to_num_(*3 * [float(buckets)])
    return whole.to(torch.int8).view(torch.uint8) if buckets < 2**7 else whole.to(torch.int32)  # 4 times uint8's speed


def _row(low: Tensor, high: Tensor, counted: Tensor) -> Tensor:
    """Rows, (..., 3 + buckets), from extremes, (...), and counts by code, (..., buckets + 1)."""
    inner, nonfinite = counted[..., :-1], counted[..., -1:]
    middle = inner.roll(inner.size(-1) // 2, -1)  # of equal elements, which are all in the first
    inner = torch.where((low < high)[..., None], inner, middle)
    return torch.cat((torch.stack((low, high), dim=-1), nonfinite.to(low), inner.to(low)), dim=-1)


def linear_edges(low: ArrayLike, high: ArrayLike, buckets: int = 64) -> NDArray[np.float64]:
    """The buckets + 1 edges of histograms whose rows begin with low and high, on the host: (..., buckets + 1).

    Where they are equal the edges lie around them. Raises ValueError for low > high and for fewer than four buckets.
    """
    _check(buckets)
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if not (low <= high).all():
        raise ValueError(f"low, high: got {low} and {high}, takes low <= high, as linear_histogram returns them")
    numbers, low, high = np.arange(buckets + 1), low[..., None], high[..., None]
    with np.errstate(over="ignore", invalid="ignore"):  # edges beyond the largest number are that
        width = _width(low, high, buckets)
        around = low + np.maximum(0.5, abs(low) * 2.0**-10) * (2 * numbers / buckets - 1)
        grid = (np.floor(low / width).astype(np.int64) + numbers) * width
        return np.where(low == high, around, grid).clip(-sys.float_info.max, sys.float_info.max)


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
    places: NDArray[np.int64] = np.clip(np.floor(starts / width) - np.floor(low / width), 0, buckets - 1).astype(int)
    return places


def _width(low: Any, high: Any, buckets: int) -> NDArray[np.float64]:
    """The smallest power of two that holds low < high in so many buckets; the same as `_grid` on the device."""
    share = np.maximum((high / 2 - low / 2) / (buckets / 2), _FINEST)  # high - low could overflow
    mantissa, exponent = np.frexp(share)
    width: NDArray[np.float64] = np.ldexp(1.0, exponent - (mantissa == 0.5))
    return width * np.where(np.floor(high / width) - np.floor(low / width) < buckets, 1, 2)


def _grid(low: Tensor, high: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """The number of the first bucket, counted from 0, and how many fit into 1; both 0 where low and high are equal."""
    share = ((high / 2 - low / 2) / (buckets / 2)).clamp(min=_FINEST)
    mantissa = torch.frexp(share).mantissa
    per_unit = mantissa / share * torch.where(mantissa == 0.5, 2.0, 1.0)  # powers of two divide exactly
    fits = torch.floor(high * per_unit) - torch.floor(low * per_unit) < buckets
    per_unit = torch.where(fits, per_unit, per_unit / 2).masked_fill(low == high, 0.0)
    return torch.floor(low * per_unit), per_unit


def _check(buckets: int) -> None:
    if buckets < LEAST:
        raise ValueError(f"buckets: got {buckets}, takes {LEAST} or more")
