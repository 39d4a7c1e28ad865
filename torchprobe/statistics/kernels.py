"""Triton kernels that read elements once: sums of everything the statistics are made of, and counts of exponents.

Imported by `fused` alone, and where Triton is there alone. Each program reads up to `span` elements, either of `x` or
of the tensor that its line of `places` names: address, length, and which tensor it is. Everything is added up in
float64, and in an order that depends on nothing but sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(13)
"""count, mean, m2, max_abs, zeros, nonfinite, sum of fourth powers; sum of squares, sum of magnitudes; low, high; and
sum of squares once more, NaN where there are elements and none is finite, with nonfinite beside it."""

CODES = tl.constexpr(256)

_BOUND = tl.constexpr(float("inf"))


@triton.jit
def _place(x, places, elements, span, ADDRESSED: tl.constexpr):
    """Where a program reads, how much, and for which tensor."""
    program = tl.program_id(0).to(tl.int64)
    if ADDRESSED:
        line = places + 3 * program
        return tl.load(line).to(x.dtype), tl.load(line + 1), tl.load(line + 2)
    else:
        return x + program * span, tl.minimum(elements - program * span, span), program * 0


@triton.jit
def _held(place, adds):
    """What is added to: 0 for a row that is new."""
    return tl.where(adds, tl.load(place), 0.0)


@triton.jit(do_not_specialize=["elements", "span", "gated"])
def sums(x, places, out, flag, elements, span, gated, ADDRESSED: tl.constexpr, BLOCK: tl.constexpr):
    """A row of COLUMNS for each program. Deviations are from a finite element: see `moments._sums`.

    gated: programs read nothing while the number at `flag` is 0, and else add to their rows, where column 3 counts.
    """
    if (gated != 0) & (tl.load(flag) == 0.0):
        return
    start, length, _ = _place(x, places, elements, span, ADDRESSED)
    lanes = tl.arange(0, BLOCK)
    zeros, nonfinite = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    low, high = tl.full([BLOCK], _BOUND, tl.float32), tl.full([BLOCK], -_BOUND, tl.float32)
    shift, deviation = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    square, fourth, absolute = (tl.zeros([BLOCK], tl.float64),) * 3
    pivot, seen = tl.max(high, 0), 0
    for offset in range(0, length, BLOCK):
        at = offset + lanes
        inside = at < length
        value = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
        finite = (tl.abs(value) < _BOUND) & inside
        if seen == 0:
            pivot = tl.max(tl.where(finite, value, -_BOUND), 0)
            seen = (pivot > -_BOUND).to(tl.int32)
        zeros += (finite & (value == 0.0)).to(tl.int32)
        nonfinite += (inside & ~finite).to(tl.int32)
        low = tl.minimum(low, tl.where(finite, value, _BOUND))
        high = tl.maximum(high, tl.where(finite, value, -_BOUND))
        value = tl.where(finite, value, 0.0)
        wide = value.to(tl.float64)
        off = tl.where(finite, wide - pivot.to(tl.float64), 0.0)
        shift += off
        deviation += off * off
        power = wide * wide
        square += power
        fourth += power * power
        absolute += tl.abs(wide)
    missing = tl.sum(nonfinite, 0)
    count = (length - missing).to(tl.float64)
    share = tl.sum(shift, 0) / tl.maximum(count, 1.0)
    row = out + tl.program_id(0).to(tl.int64) * COLUMNS
    adds = gated != 0
    before = _held(row, adds)
    near = _held(row + 1, adds)
    weight = count / tl.maximum(before + count, 1.0)
    apart = tl.where(count > 0, pivot.to(tl.float64) + share, near) - near
    m2 = tl.maximum(tl.sum(deviation, 0) - tl.sum(shift, 0) * share, 0.0) + apart * apart * (before * weight)
    least = tl.where(before > 0, _held(row + 9, adds), _BOUND)
    most = tl.where(before > 0, _held(row + 10, adds), -_BOUND)
    tl.store(row, before + count)
    tl.store(row + 1, near + apart * weight)
    tl.store(row + 2, _held(row + 2, adds) + m2)
    tl.store(row + 3, _held(row + 3, adds) + 1.0)
    tl.store(row + 4, _held(row + 4, adds) + tl.sum(zeros, 0).to(tl.float64))
    tl.store(row + 5, _held(row + 5, adds) + missing.to(tl.float64))
    tl.store(row + 6, _held(row + 6, adds) + tl.sum(fourth, 0))
    tl.store(row + 7, _held(row + 7, adds) + tl.sum(square, 0))
    tl.store(row + 8, _held(row + 8, adds) + tl.sum(absolute, 0))
    tl.store(row + 9, tl.minimum(tl.min(low, 0).to(tl.float64), least))
    tl.store(row + 10, tl.maximum(tl.max(high, 0).to(tl.float64), most))


@triton.jit(do_not_specialize=["programs"])
def merged(partial, ends, out, programs, ADDRESSED: tl.constexpr, BLOCK: tl.constexpr):
    """The row of each tensor from those of its programs: Chan, Golub and LeVeque (1983). fourth is over max_abs."""
    tensor = tl.program_id(0).to(tl.int64)
    if ADDRESSED:
        first, last = tl.load(ends + tensor), tl.load(ends + tensor + 1)
    else:
        first, last = tensor * 0, tensor * 0 + programs
    lanes = tl.arange(0, BLOCK)
    near = tl.load(partial + first * COLUMNS + 1, mask=first < last, other=0.0)
    count, shift, zeros, nonfinite = (tl.zeros([BLOCK], tl.float64),) * 4
    fourth, square, absolute = (tl.zeros([BLOCK], tl.float64),) * 3
    low, high = tl.full([BLOCK], _BOUND, tl.float64), tl.full([BLOCK], -_BOUND, tl.float64)
    for start in range(first, last, BLOCK):
        inside = start + lanes < last
        row = partial + (start + lanes) * COLUMNS
        own = tl.load(row, mask=inside, other=0.0)
        count += own
        shift += own * (tl.load(row + 1, mask=inside, other=0.0) - near)
        zeros += tl.load(row + 4, mask=inside, other=0.0)
        nonfinite += tl.load(row + 5, mask=inside, other=0.0)
        fourth += tl.load(row + 6, mask=inside, other=0.0)
        square += tl.load(row + 7, mask=inside, other=0.0)
        absolute += tl.load(row + 8, mask=inside, other=0.0)
        low = tl.minimum(low, tl.where(own > 0, tl.load(row + 9, mask=inside, other=_BOUND), _BOUND))
        high = tl.maximum(high, tl.where(own > 0, tl.load(row + 10, mask=inside, other=-_BOUND), -_BOUND))
    total = tl.sum(count, 0)
    mean = tl.where(total > 0, near + tl.sum(shift, 0) / tl.maximum(total, 1.0), 0.0)
    m2 = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        inside = start + lanes < last
        row = partial + (start + lanes) * COLUMNS
        apart = tl.load(row + 1, mask=inside, other=0.0) - mean
        m2 += tl.load(row + 2, mask=inside, other=0.0) + tl.load(row, mask=inside, other=0.0) * apart * apart
    least = tl.where(total > 0, tl.min(low, 0), 0.0)
    most = tl.where(total > 0, tl.max(high, 0), 0.0)
    largest = tl.maximum(most, -least)
    scale = tl.where(largest > 0, largest, 1.0)
    squares, missing = tl.sum(square, 0), tl.sum(nonfinite, 0)
    row = out + tensor * COLUMNS
    tl.store(row, total)
    tl.store(row + 1, mean)
    tl.store(row + 2, tl.sum(m2, 0))
    tl.store(row + 3, largest)
    tl.store(row + 4, tl.sum(zeros, 0))
    tl.store(row + 5, missing)
    tl.store(row + 6, tl.sum(fourth, 0) / (scale * scale) / (scale * scale))
    tl.store(row + 7, squares)
    tl.store(row + 8, tl.sum(absolute, 0))
    tl.store(row + 9, least)
    tl.store(row + 10, most)
    tl.store(row + 11, tl.where((missing > 0) & (total == 0), float("nan"), squares))
    tl.store(row + 12, missing)


@triton.jit(do_not_specialize=["elements", "span"])
def exponents(x, places, out, elements, span, ADDRESSED: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to each tensor's int64 row of CODES + 1: float32's exponent codes, and the elements that are not 0."""
    start, length, tensor = _place(x, places, elements, span, ADDRESSED)
    lanes = tl.arange(0, BLOCK)
    codes = tl.zeros([CODES], tl.int32)
    nonzero = tl.zeros([BLOCK], tl.int32)
    padded = 0
    for offset in range(0, length, BLOCK):
        at = offset + lanes
        value = tl.load(start + at, mask=at < length, other=0.0).to(tl.float32)
        codes += tl.histogram((value.to(tl.int32, bitcast=True) >> 23) & (CODES - 1), CODES)
        nonzero += (value != 0.0).to(tl.int32)
        padded += BLOCK
    bins = tl.arange(0, CODES)
    codes -= tl.where(bins == 0, padded - length, 0).to(tl.int32)  # what lies beyond the end was read as 0
    row = out + tensor * (CODES + 1)
    tl.atomic_add(row + bins, codes.to(tl.int64))
    tl.atomic_add(row + CODES, tl.sum(nonzero, 0).to(tl.int64))


@triton.jit(do_not_specialize=["elements", "span"])
def bins(x, places, grid, out, elements, span, ADDRESSED: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Adds to each tensor's int64 row of BINS // 2 + 1: elements by bucket, and those that are not finite.

    A tensor's line of `grid`: the number of its first bucket, and how many fit into 1.
    """
    start, length, tensor = _place(x, places, elements, span, ADDRESSED)
    first, per_unit = tl.load(grid + 2 * tensor), tl.load(grid + 2 * tensor + 1)
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], tl.int32)
    for offset in range(0, length, BLOCK):
        at = offset + lanes
        inside = at < length
        value = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
        finite = tl.abs(value) < _BOUND
        scaled = tl.floor(tl.where(finite, value, 0.0).to(tl.float64) * per_unit) - first  # a power of two: exact
        bucket = tl.where(finite, scaled.to(tl.int32), BINS // 2)
        counts += tl.histogram(tl.where(inside, bucket, BINS - 1), BINS)
    at = tl.arange(0, BINS)
    tl.atomic_add(out + tensor * (BINS // 2 + 1) + at, counts.to(tl.int64), mask=at <= BINS // 2)
