"""A histogram with equal buckets between the smallest and the largest finite element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchprobe.statistics import counts, dense
from torchprobe.statistics.counts import count_codes, count_halves
from torchprobe.statistics.dtypes import Scratch, on_host, owners, pieces, real

HEADER = ("low", "high", "nonfinite")
"""What stands before the counts."""

_PACK = 64  # small tensors counted together


def linear_histogram(x: Tensor, buckets: int = 64) -> Tensor:
    """Counts of the elements of `x`: [low, high, nonfinite, one for each bucket], shape (3 + buckets,), `row_dtype`.

    `x` is any strided floating or complex tensor; low and high are its smallest and largest finite element, both 0
    if there is none. `edges` gives the bounds of the buckets: a bucket holds its lower edge, the last one both.
    Counts add up to the number of finite elements; one that is within rounding of an edge (1e-15 of the range) may
    be counted on its other side. Equal elements all are in the middle bucket.

    Makes no host read; reads the data twice, and costs 0.8 ns an element of finite float32 on two CPU cores, else
    1.8. Raises TypeError for integers and ValueError for fewer than one bucket.
    """
    return linear_histograms([x], buckets)[0]


def linear_histograms(tensors: Sequence[Tensor], buckets: int = 64) -> Tensor:
    """The row of each of many tensors of one device: shape (n, 3 + buckets). Small ones are counted together."""
    _check(buckets)
    tensors = [real(x) for x in tensors]
    if not tensors:
        return torch.zeros(0, len(HEADER) + buckets, dtype=torch.float64)
    small = [i for i, x in enumerate(tensors) if dense.applies_to(x) and x.numel() < counts.SMALL]
    found: dict[int, Tensor] = {}
    for start in range(0, len(small), _PACK):
        pack = small[start : start + _PACK]
        rows = _together([tensors[i] for i in pack], buckets)
        found.update((i, row) for i, row in zip(pack, rows, strict=True) if row is not None)
    return torch.stack([found[i] if i in found else _histogram(x, buckets) for i, x in enumerate(tensors)])


def _histogram(x: Tensor, buckets: int) -> Tensor:
    row = _dense(x, buckets) if dense.applies_to(x) else None
    return _careful(x, buckets) if row is None else row


def _careful(x: Tensor, buckets: int) -> Tensor:
    scratch = Scratch.for_elements_of([x], x.device)
    if x.numel() == 0:
        return scratch.wide.new_zeros(len(HEADER) + buckets)
    low, high = _extremes(x, scratch)
    codes = _count(x, low, high, buckets, scratch)
    counts = codes[:buckets].clone()
    counts[-1] += codes[buckets]
    counts = torch.where(low < high, counts, counts.roll(buckets // 2))
    return torch.cat((torch.stack((low, high)), codes[-1:], counts)).to(scratch.wide)


def _dense(x: Tensor, buckets: int) -> Tensor | None:
    """The row of float32 elements in host memory; None when one is not finite."""
    ends = [(on_host(piece.amin()), on_host(piece.amax())) for piece in pieces(x, dense.PIECE)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if not all(math.isfinite(end) for both in ends for end in both):
        return None
    counted = torch.zeros(buckets + 1, dtype=torch.int64, device=x.device)
    if low == high:
        counted[buckets // 2] = x.numel()
    else:
        _count_between(x, low, high, counted)
        counted[-2] += counted[-1]
    header = torch.tensor((low, high, 0.0), dtype=torch.float64, device=x.device)
    return torch.cat((header, counted[:-1].to(header)))


def _count_between(x: Tensor, low: float, high: float, counted: Tensor) -> None:
    per_unit = (len(counted) - 1) / (high - low)
    wide = torch.empty(min(x.numel(), dense.PIECE), dtype=torch.float64, device=x.device)
    codes = torch.empty_like(wide, dtype=torch.int16 if len(counted) <= 181 else torch.int32)
    for piece in pieces(x, dense.PIECE):
        position = wide[: piece.numel()].copy_(piece).sub_(low).mul_(per_unit)
        counted += count_halves(codes[: piece.numel()].copy_(position), len(counted))


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
    per_unit = (buckets / (high - low)).masked_fill_(low == high, 0.0)
    codes = ((packed - low[owner]) * per_unit[owner]).long().add_(owner, alpha=buckets + 1)
    counted = torch.bincount(codes, minlength=len(low) * (buckets + 1)).view(len(low), -1)
    counted[:, -2] += counted[:, -1]
    inner = counted[:, :-1]
    inner = torch.where((low < high)[:, None], inner, inner.roll(buckets // 2, 1))
    return torch.cat((torch.stack((low, high, torch.zeros_like(low)), dim=1), inner.to(low)), dim=1)


def edges(low: float, high: float, buckets: int = 64) -> list[float]:
    """The buckets + 1 edges of a histogram whose row begins with low and high, on the host.

    Where they are equal the edges lie around them. Raises ValueError for low > high and for fewer than one bucket.
    """
    _check(buckets)
    if not low <= high:
        raise ValueError(f"low, high: got {low} and {high}, takes low <= high, as linear_histogram returns them")
    if low == high:
        half = max(0.5, math.ldexp(abs(low), -10))
        return [low + half * (2 * i / buckets - 1) for i in range(buckets + 1)]
    half_step = (high / 2 - low / 2) / buckets  # high - low could overflow
    inner = (2 * (low / 2 + i * half_step) for i in range(1, buckets))
    return [low, *(min(max(edge, low), high) for edge in inner), high]


def _extremes(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The smallest and the largest finite element, in the row's type."""
    lows, highs = [], []
    for piece in pieces(x, len(scratch.values)):
        values = scratch.part(piece.numel()).values
        lows.append(values.copy_(piece).nan_to_num_(math.inf, math.inf, math.inf).amin())
        highs.append(values.copy_(piece).nan_to_num_(-math.inf, -math.inf, -math.inf).amax())
    low, high = torch.stack(lows).amin().to(scratch.wide), torch.stack(highs).amax().to(scratch.wide)
    return low.masked_fill(low.isinf(), 0.0), high.masked_fill(high.isinf(), 0.0)


def _count(x: Tensor, low: Tensor, high: Tensor, buckets: int, scratch: Scratch) -> Tensor:
    """Elements in each bucket, exactly on the last edge, and non-finite: int64 of shape (buckets + 2,)."""
    unit = 0.5 if x.dtype == torch.float64 else 1.0  # high - low could overflow
    low, high = low * unit, high * unit
    per_unit = (buckets / (high - low)).clamp(max=torch.finfo(low.dtype).max).masked_fill(low == high, 0.0)
    codes = torch.zeros(buckets + 2, dtype=torch.int64, device=x.device)
    for piece in pieces(x, len(scratch.values)):
        part = scratch.part(piece.numel())
        wide = part.wide.copy_(part.source(piece))
        if unit != 1.0:
            wide.mul_(unit)
        position = wide.sub_(low).mul_(per_unit).nan_to_num_(*3 * [buckets + 1.0])
        codes += count_codes(position.int(), buckets + 2)
    return codes


def _check(buckets: int) -> None:
    if buckets < 1:
        raise ValueError(f"buckets: got {buckets}, takes 1 or more")
