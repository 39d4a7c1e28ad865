"""The common case, fast: tensors in host memory whose elements are all finite and of ordinary size.

Elsewhere every statistic masks what is not finite, which costs several passes over the data. In host memory a sum
can be looked at for free (nothing waits: the CPU has just computed it), and shows whether there is anything to
mask. Squares are summed by the norms of short rows, in one pass without temporaries, and everything else by cascade
sums over chunks that stay in cache; these are added up in float64: within 1e-6, of which 7e-7 is seen where all
elements are equal and 1e-8 where they are random. `torch.dot` is off by 3e-5 where many elements are equal (after
dropout or ReLU), and `torch.linalg.vector_norm` of a whole tensor by 1e-3 at 20 million elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from torchprobe.statistics.dtypes import PLAIN, chunks, on_host

TYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2**18  # elements worked on in several passes: with their scratch they fit two cores' L2
_STREAM = 16  # so many chunks at a time where one pass is enough
_ROW = 512  # elements whose squares are added up in float32, 32 to a lane
_TINY = 1e-15  # squares of smaller deviations would lose digits in float32
_SQUARES = 1e-12, 1e15  # between them fourth powers neither vanish beside the largest nor, 512 together, overflow
_FLAT = 1e-12  # a smaller variance, as a part of the mean square, is of the rounding of the mean's own square


def is_plain(x: Tensor) -> bool:
    """Whether a tensor has elements in host memory to look at: a fake or wrapped one has none."""
    return x.is_cpu and type(x) in PLAIN


def applies_to(x: Tensor) -> bool:
    """Whether a tensor may be the common case."""
    return x.dtype in TYPES and x.is_cpu and type(x) in PLAIN and x.numel() > 0


def sums(x: Tensor, *, absolute: bool = False) -> tuple[float, ...] | None:
    """The sum of squares, 0 and, where wanted, the sum of magnitudes; None when not the common case after all."""
    copied = absolute or not x.is_contiguous() or x.dtype != torch.float32
    size = CHUNK if copied else _STREAM * CHUNK  # what is copied, a chunk at a time
    scratch = _scratch(x) if absolute else x
    norms, magnitudes = [], 0.0
    for chunk in _floats(x, size):
        norms += [_row_norms(chunk)]
        if absolute:
            magnitudes += on_host(torch.abs(chunk, out=_first(scratch, chunk.shape[0])).sum())
    squares = _squares(norms)
    if not _TINY**2 < squares < math.inf:
        return None
    return (squares, 0.0, magnitudes) if absolute else (squares, 0.0)


def moments(x: Tensor) -> tuple[float, ...] | None:
    """count, mean, sum of squared deviations, largest magnitude, zeros, 0, and the sum of fourth powers of the elements
    over the largest magnitude; None when not the common case after all.
    """
    scratch = _scratch(x)
    norms, totals, fourths, max_abs, zeros = [], [], [], 0.0, 0.0
    for chunk in _floats(x, CHUNK):
        norms.append(_row_norms(chunk))
        totals.append(on_host(chunk.sum()))
        largest, without, fourth = _extremes(chunk, _first(scratch, chunk.shape[0]))
        max_abs, zeros = max(max_abs, largest), zeros + without
        fourths.append((largest, fourth))
    count, squares = x.numel(), _squares(norms)
    if not squares < math.inf:
        return None
    mean = math.fsum(totals) / count
    m2 = squares - count * mean * mean
    if not m2 > squares / 2:  # it cancels
        mean, m2 = _deviations(x, mean, scratch)
    if m2 < max(_TINY**2, _FLAT * squares) and max_abs:  # float32 has lost its digits
        low, high = x.aminmax()
        if on_host(low) != on_host(high):
            return None
        mean, m2 = on_host(x[(0,) * x.dim()]), 0.0
    fourth = math.fsum((largest / max_abs) ** 4 * some for largest, some in fourths) if max_abs else 0.0
    return float(count), mean, m2, max_abs, zeros, 0.0, fourth


def _extremes(x: Tensor, scratch: Tensor) -> tuple[float, float, float]:
    """The largest magnitude of a 1-D tensor, its zeros, and the sum of fourth powers of its elements over the largest.

    From the squares, the root of the largest of which is exact, where neither they nor their own leave the range.
    """
    squares = torch.square(x, out=scratch)
    low, high = squares.view(torch.int32).aminmax()  # in the order of the floats, and compared faster
    square = on_host(high.view(torch.float32))
    if not _SQUARES[0] < square < _SQUARES[1]:
        return _scaled_extremes(x, scratch)
    fourth = _squares([_row_norms(squares)]) / square**2
    return on_host(high.view(torch.float32).sqrt()), _zeros(x, low, scratch), fourth


def _scaled_extremes(x: Tensor, scratch: Tensor) -> tuple[float, float, float]:
    """The same of elements of any size, divided by the largest before they are squared."""
    low, high = torch.abs(x, out=scratch).view(torch.int32).aminmax()
    largest, zeros = on_host(high.view(torch.float32)), _zeros(x, low, scratch)
    if not 0 < largest < math.inf:
        return largest, zeros, 0.0
    return largest, zeros, _squares([_row_norms(torch.div(x, largest, out=scratch).square_())])


def _zeros(x: Tensor, least: Tensor, scratch: Tensor) -> float:
    """How many elements are 0, of which the least magnitude, or its square, tells whether there may be any."""
    return 0.0 if on_host(least) else x.shape[0] - on_host(torch.ne(x, 0.0, out=scratch).sum())


def _deviations(x: Tensor, near: float, scratch: Tensor) -> tuple[float, float]:
    """The mean, and the sum of squared deviations from it, taken one by one from a number near the mean."""
    pivot = torch.tensor(near, dtype=scratch.dtype, device=x.device)
    norms, shifts = [], []
    for chunk in _floats(x, CHUNK):
        deviations = torch.sub(chunk, pivot, out=_first(scratch, chunk.shape[0]))
        norms.append(_row_norms(deviations))
        shifts.append(on_host(deviations.sum()))
    shift = math.fsum(shifts) / x.numel()
    return on_host(pivot) + shift, max(_squares(norms) - x.numel() * shift * shift, 0.0)


def _row_norms(x: Tensor) -> Tensor:
    """The norms of short rows of a 1-D tensor; not finite where an element is not, or is huge."""
    whole = x.shape[0] // _ROW * _ROW
    if whole < x.shape[0]:
        rest = torch.linalg.vector_norm(x[whole:]).view(1)
        return torch.cat((_row_norms(x[:whole]), rest)) if whole else rest
    norms: Tensor = torch.linalg.vector_norm(x.view(-1, _ROW), dim=1)
    return norms


def _squares(norms: list[Tensor]) -> float:
    """The sum of squares of the elements that norms are of."""
    wide = (torch.cat(norms) if norms[1:] else norms[0]).double()
    return on_host(torch.dot(wide, wide))


def _floats(x: Tensor, size: int) -> Iterable[Tensor]:
    """The elements of a tensor, a 1-D chunk at a time, as float32: exactly what they are."""
    if x.dtype == torch.float32:
        return chunks(x, size)
    room = _scratch(x)
    return (room[: chunk.shape[0]].copy_(chunk) for chunk in chunks(x, size))


def _scratch(x: Tensor) -> Tensor:
    return torch.empty(min(x.numel(), CHUNK), dtype=torch.float32, device=x.device)


def _first(scratch: Tensor, size: int) -> Tensor:
    return scratch if size == scratch.shape[0] else scratch[:size]
