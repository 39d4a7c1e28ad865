"""Count, mean, variance, fourth moment, largest magnitude, zeros and non-finite elements of a tensor, in one mergeable
row.

And how many of its units are active.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.library import Library

from torchprobe.statistics import dense, fused
from torchprobe.statistics.dtypes import Scratch, chunks, real, row_dtype

FIELDS = ("count", "mean", "m2", "max_abs", "zeros", "nonfinite", "fourth")
"""Columns of a row. count, mean, m2 (the sum of squared deviations from the mean), max_abs, zeros and fourth (the sum
of the fourth powers of elements over max_abs, which neither overflows nor vanishes) are over the finite elements."""

_LEAST = 1e-150  # an rms below it has lost digits: the squares are subnormal
_LEAST_SQUARE = 1e-140  # below that of any element narrower than float64, and its own square is no 0

_operators = Library("torchprobe_statistics", "FRAGMENT")

RARELY = 0.01
"""A unit that is active on a smaller share of its inputs is inactive."""


def compute(x: Tensor) -> Tensor:
    """The row of `x`: shape (7,), `row_dtype`, on the device of `x`. All zeros for an empty tensor.

    `x` is any strided floating or complex tensor (see `dtypes.real`). Counts and max_abs are exact. Of n elements the
    mean is within 1e-14·max_abs and m2 within 1e-15·(n + max_abs / std) of itself, so a mean far from zero does no
    harm. m2 is inf where it exceeds the row's type, which takes float64 elements above 1e142. fourth is within 1e-12 of
    itself.

    For finite elements of 16 or 32 bits in host memory (see `dense`) the mean is within 3e-7 of max_abs, m2 and fourth
    within 2e-6 of themselves, at 1 ns an element on a CPU core; else in cache-sized chunks, at 4.5 ns. On a GPU with
    Triton the elements are read once (see `fused`). Makes no device wait, and is one operator in a graph of
    `torch.compile`, whose back end opens and fuses it. Raises TypeError for integers.
    """
    if torch.compiler.is_compiling():
        return _operator(x)
    x = real(x)
    if x.numel() == 0:
        return _nothing(x)
    if fused.applies_to(x):
        return fused.rows([x])[0, fused.MOMENTS]
    common = dense.moments(x) if dense.applies_to(x) else None
    if common is not None:
        return torch.tensor(common, dtype=torch.float64, device=x.device)
    scratch = Scratch.for_elements_of([x], x.device)
    return _merged(_rows(chunks(x, len(scratch.values)), scratch))


def combine(a: Tensor, b: Tensor) -> Tensor:
    """The row of two tensors' elements together, from the row of each: shapes (..., 7), broadcast.

    Chan, Golub and LeVeque (1983), equations 2.1: associative and commutative up to rounding. The row of zeros is
    the identity, exactly.
    """
    count_a, mean_a, m2_a, max_a, zeros_a, nonfinite_a, fourth_a = a.unbind(-1)
    count_b, mean_b, m2_b, max_b, zeros_b, nonfinite_b, fourth_b = b.unbind(-1)
    count = count_a + count_b
    delta = mean_b - mean_a
    share_b = count_b / count.clamp(min=1)
    mean = mean_a + delta * share_b
    m2 = m2_a + m2_b + delta * (delta * (count_a * share_b))  # weight first: 0 · inf is not 0
    max_abs = torch.maximum(max_a, max_b)
    scale = torch.where(max_abs > 0, max_abs, 1.0)
    fourth = fourth_a * (max_a / scale) ** 4 + fourth_b * (max_b / scale) ** 4
    return torch.stack((count, mean, m2, max_abs, zeros_a + zeros_b, nonfinite_a + nonfinite_b, fourth), dim=-1)


def summarise(row: Sequence[float]) -> dict[str, float]:
    """A row in readable terms, on the host: mean, std, rms, max_abs, zero_fraction, kurtosis, nonfinite.

    std is the population's: sqrt(m2 / count). zero_fraction is of the finite elements. kurtosis is the fourth moment
    about 0 over the squared second one, minus 3: 0 for a normal distribution around 0, -2 for one magnitude alone,
    count - 3 for a single element that is not 0; it is not there where all are 0, or float64 elements lie beyond their
    own squares. Only nonfinite is there when no element is finite. Raises ValueError for a row of another length.
    """
    if len(row) != len(FIELDS):
        raise ValueError(f"row: got {len(row)} numbers, takes {len(FIELDS)} ({', '.join(FIELDS)}), as compute returns")
    count, mean, m2, max_abs, zeros, nonfinite, fourth = row
    if not count:
        return {"nonfinite": nonfinite}
    std = math.sqrt(m2 / count)
    rms = math.hypot(mean, std)
    ordinary = _LEAST < rms < math.inf
    return {
        "mean": mean,
        "std": std,
        "rms": rms,
        "max_abs": max_abs,
        "zero_fraction": zeros / count,
        **({"kurtosis": fourth / count * (max_abs / rms) ** 4 - 3} if ordinary else {}),
        "nonfinite": nonfinite,
    }


def active_units(x: Tensor) -> Tensor:
    """On how many inputs each unit of `x` is above zero: int64 of shape (units,).

    Units are channels, dimension 1, of a tensor with four or more dimensions, else the last dimension; all other
    dimensions are inputs. A 0-dim tensor is one unit. NaN counts as active: it is another illness.
    """
    x = x.detach()
    unit = 1 if x.dim() >= 4 else x.dim() - 1
    active = (x <= 0).logical_not()
    return active.sum([d for d in range(x.dim()) if d != unit]) if x.dim() > 1 else active.to(torch.int64).reshape(-1)


def inactive_share(counts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The share of units that are active on under 1 % of inputs, from (active counts, inputs) of one device: 0-dim."""
    dead = torch.cat([active.to(torch.float32) < RARELY * inputs for active, inputs in counts])
    return dead.to(torch.float32).mean()


def operator(name: str, body: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An operator of torch's that is nothing but others: in a graph one call until a compiler's back end opens it.

    Dynamo takes 5 ms for each operation of a body that it traces itself, in every module that is watched.
    """
    _operators.define(f"{name}(Tensor x) -> Tensor")
    _operators.impl(name, body, "CompositeImplicitAutograd")
    return getattr(torch.ops.torchprobe_statistics, name).default  # type: ignore[no-any-return]


def in_graph(x: Tensor) -> Tensor:
    """The row in one pass and few operations: every one is compiled for every module that is watched.

    In float64 squares of narrower elements are exact, neither they nor fourth powers leave the range, and their sum
    needs no pivot until the mean is a million times the deviation. Chunks, which are for caches and threads, would only
    unroll the graph.
    """
    x = real(x)
    if x.numel() == 0:
        return _nothing(x)
    if not _squares_are_exact(x):
        return _rows([x.reshape(-1)], Scratch.for_elements_of([x], x.device, x.numel()))[0]
    wide, count = _finite_in_graph(x)
    squares = wide.square()
    total, square, largest = wide.sum(), squares.sum(), squares.amax()
    mean = total / count.clamp(min=1)
    m2 = (square - total * mean).clamp(min=0)
    fourth = squares.square().sum() / largest.clamp(min=_LEAST_SQUARE).square()
    zeros = (x == 0).sum(dtype=torch.float64)
    return torch.stack((count, mean, m2, largest.sqrt(), zeros, x.numel() - count, fourth))


def _squares_are_exact(x: Tensor) -> bool:
    return x.dtype != torch.float64 and row_dtype(x.device) == torch.float64


def _finite_in_graph(x: Tensor) -> tuple[Tensor, Tensor]:
    """The elements in float64, with 0 for those that are not finite, and how many are."""
    is_finite = x.abs() < math.inf  # nan_to_num's three comparisons cost as much again, twice over
    return torch.where(is_finite, x, 0.0).double(), is_finite.sum(dtype=torch.float64)


def row_of_squares(squares: Tensor, nonfinite: Tensor, count: Tensor) -> Tensor:
    """The row of `norms.SQUARES`, of 0-dim tensors: the sum over finite elements, and how many others there are."""
    return torch.stack((torch.where((count == 0) & (nonfinite > 0), math.nan, squares), nonfinite))


def _squares_in_graph(x: Tensor) -> Tensor:
    x = real(x)
    if x.numel() == 0 or not _squares_are_exact(x):
        count, mean, m2, _, _, nonfinite, _ = in_graph(x).unbind()
        return row_of_squares(m2 + count * mean.square(), nonfinite, count)
    wide, count = _finite_in_graph(x)
    return row_of_squares(wide.square().sum(), x.numel() - count, count)


_operator = operator("moments", in_graph)
squares_operator = operator("sum_squares", _squares_in_graph)


def _nothing(like: Tensor) -> Tensor:
    return torch.zeros(len(FIELDS), dtype=row_dtype(like.device), device=like.device)


def _rows(some: Iterable[Tensor], scratch: Scratch) -> Tensor:
    """One row for each 1-D chunk: shape (chunks, 7)."""
    columns = zip(*(_sums(chunk, scratch.first(chunk.numel())) for chunk in some), strict=True)
    parts = (torch.stack(c).to(scratch.wide) for c in columns)
    zeros, nonzero, finite_nonzero, low, high, pivot, shift, square, fourth = parts
    count = zeros + finite_nonzero
    mean_shift = shift / count.clamp(min=1)
    m2 = torch.where(square.isinf(), square, (square - shift * mean_shift).clamp(min=0))
    max_abs = torch.maximum(high, -low)
    return torch.stack((count, pivot + mean_shift, m2, max_abs, zeros, nonzero - finite_nonzero, fourth), dim=-1)


def _sums(x: Tensor, scratch: Scratch) -> tuple[Tensor, ...]:
    """What a row is made of, as 0-dim tensors; the last three are the sums of the deviations from `pivot`, of their
    squares, and of the fourth powers of elements over the largest magnitude.

    The pivot is a finite element p. As (p - mean)² <= m2, the squares sum to at most (n + 1)·m2: that bounds what
    cancels when the mean's share is taken off.
    """
    values, wide = scratch
    source = x if x.dtype == values.dtype else values.copy_(x)
    wide.copy_(source)
    nonzero = source.count_nonzero()
    finite = torch.nan_to_num(source, 0.0, 0.0, 0.0, out=values)
    finite_nonzero = finite.count_nonzero()
    low, high = finite.aminmax()
    pivot = torch.where(high > 0, high, low).to(wide)  # never a 0 that stands for a non-finite element
    pivot = pivot * (pivot.abs() < math.sqrt(torch.finfo(pivot.dtype).max) * 2.0**-40)  # or it could overflow
    wide.sub_(pivot).nan_to_num_(0.0, 0.0, 0.0)
    shift, square = wide.sum(), wide.square_().sum()
    fourth = _fourth(wide.copy_(finite).square_(), finite, torch.maximum(high, -low))
    return x.numel() - nonzero, nonzero, finite_nonzero, low, high, pivot, shift, square, fourth


def _fourth(squares: Tensor, finite: Tensor, max_abs: Tensor) -> Tensor:
    """The sum of fourth powers of 1-D finite elements over the largest magnitude, 0 where that is, from their squares.

    Those of a narrower type than the squares' stay in its range without being divided first.
    """
    scale = torch.where(max_abs > 0, max_abs, 1.0).to(squares.dtype)
    same = finite.dtype == squares.dtype
    squares = (finite / scale).square() if same else squares
    total = torch.dot(squares, squares)  # which takes no room
    return total if same else total / scale**4


def _merged(rows: Tensor) -> Tensor:
    """The row of all chunks, (7,), from theirs, (chunks, 7), pairwise: rounding grows with log(parts)."""
    while len(rows) > 1:
        if len(rows) % 2:
            rows = torch.cat((rows, torch.zeros_like(rows[:1])))
        rows = combine(rows[::2], rows[1::2])
    return rows[0]
