"""Norms, and the sums they are made of: of one tensor, or over each of many at once, such as all gradients of a model.

Large tensors are cut up and small ones packed together, so that each operation has a cache's worth of elements. They
are copied once, into scratch memory that is used again and again; all arithmetic happens there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchprobe.statistics import dense, fused, moments
from torchprobe.statistics.dtypes import PLAIN, Scratch, chunks, real, reals, row_dtype

FIELDS = ("sum_squares", "sum_abs", "nonfinite", "count")
"""Columns of `finite_sums`. The sums and the count are over the finite elements; rows merge by addition."""

WIDTH = len(FIELDS)

SQUARES = FIELDS[0], FIELDS[2]
"""Columns of `sum_squares`: over the finite elements, NaN where there are elements and none is finite; and the others'
number."""

_ROW, _CACHED = 2**12, 2**16
_NARROW = (torch.bfloat16, torch.float16)

SUMS = "sum_squares", "count", "elements"
"""Columns of `sums_of_squares`: the first two over the finite elements; rows merge by addition."""

_SMALL = 2**12
"""Tensors of fewer elements are cheaper packed together."""

_FEW = 2**13
"""Those of fewer elements in host memory are cheaper in float64 together than each by itself."""


def finite_sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sums of each tensor, as `FIELDS` says: shape (n, 4), `row_dtype`, on the tensors' device.

    The tensors are any `dtypes.measurable` ones of one device, of any mixture of types, shapes and layouts. Sums are
    exact to 1e-14, and to 1e-6 for large finite tensors of 16 or 32 bits in host memory (see `dense`), which take 0.6
    ns an element on two CPU cores; others take 1.1 ns, and 10 µs a tensor. Counts are exact. float64 elements above
    1e154 may give an infinite sum_squares. `l2_norm` says what the norm of a row is.

    Makes no host read. Raises TypeError for integers and ValueError for tensors on several devices.
    """
    tensors = reals(tensors)
    squares, nonfinite, absolute = _sums(tensors, absolute=True).unbind(-1)
    count = _minus(nonfinite, [x.numel() for x in tensors])
    return torch.stack((squares, absolute, nonfinite, count), dim=-1)


def l2_norm(row: Sequence[float]) -> float:
    """The L2 norm that a row of `finite_sums`, or a sum of such rows, tells, on the host.

    NaN where there are elements and none is finite: nothing is known then, and 0 would look like a vanished gradient.
    """
    squares, _, nonfinite, count = row
    return math.nan if nonfinite and not count else math.sqrt(squares)


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The row of `SUMS` of each tensor: shape (n, 3), `row_dtype`.

    Takes, promises and raises what `finite_sums` does, at 0.2 ns an element where that takes 0.6, else at 0.8.
    """
    tensors = reals(tensors)
    squares, nonfinite = _sums(tensors, absolute=False).unbind(-1)
    count = _minus(nonfinite, [x.numel() for x in tensors])
    return torch.stack((squares, count, count + nonfinite), dim=-1)


def l2_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm over the finite elements of each tensor: shape (n,), `row_dtype`.

    NaN where there are elements and none is finite; 0 for an empty tensor. Takes, promises and raises what
    `sums_of_squares` does.
    """
    return _roots(sums_of_squares(tensors))


def distances(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """L2 norms over the finite elements of other - x and of other, and the root of the number of the former, pair by
    pair: shape (n, 3), `row_dtype`. All three merge as norms do.

    Takes, promises and raises what `l2_norms` does, of pairs of equal shapes; overwrites `others` with the differences,
    so that no room for them is needed. Of 16 bits one pair at a time is subtracted, in float32, beside them.
    """
    size, narrow = l2_norms(others), {i for i, x in enumerate(tensors) if x.dtype in _NARROW}
    wide = [i for i in range(len(tensors)) if i not in narrow]
    if wide:
        torch._foreach_sub_([others[i] for i in wide], [tensors[i] for i in wide])
    sums = sums_of_squares([others[i] for i in wide])
    if narrow:
        rows = dict(zip(wide, sums, strict=True))
        rows.update((i, sums_of_squares([others[i].float().sub_(tensors[i])])[0]) for i in narrow)
        sums = torch.stack([rows[i] for i in range(len(tensors))])
    return torch.stack((_roots(sums), size, sums[:, 1].sqrt()), dim=1)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What `distances` is to compare with later, in memory of its own.

    On a GPU those of one type by a few kernels for all: times 1, bit for bit the same but for the payload of a NaN.
    """
    found = {i: x.detach().clone() for i, x in enumerate(tensors) if not fused.applies_to(x)}
    for kind in fused.TYPES:
        some = {i: x.detach() for i, x in enumerate(tensors) if i not in found and x.dtype == kind}
        found.update(zip(some, torch._foreach_mul([*some.values()], 1.0) if some else (), strict=True))
    return [found[i] for i in range(len(tensors))]


def _roots(sums: Tensor) -> Tensor:
    squares, count, elements = sums.unbind(-1)
    return squares.masked_fill((count == 0) & (elements > 0), math.nan).sqrt()


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each tensor: shape (n,), `row_dtype`; 0 for an empty one.

    Takes, promises and raises what `finite_sums` does, but that NaN or inf among the elements is no finite answer.
    Exact. Costs as much as `l2_norms` in host memory, one fused kernel elsewhere.
    """
    tensors = reals(tensors)
    device = _common_device(tensors)
    if not tensors:
        return torch.zeros(0, dtype=row_dtype(device), device=device)
    if device.type == "cpu":
        sizes = [x.numel() for x in tensors]
        small = [i for i, size in enumerate(sizes) if 0 < size < _SMALL]
        norms = torch._foreach_norm([tensors[i] for i in small], math.inf) if small else ()
        ends = dict(zip(small, norms, strict=True))
        found = [ends[i] if i in ends else _largest(x) if sizes[i] else x.new_zeros(()) for i, x in enumerate(tensors)]
    else:
        found = [x if len(x) else x.new_zeros(1) for x in (x.reshape(-1) for x in tensors)]
        found = list(torch._foreach_norm(found, math.inf))
    kinds = {x.dtype for x in found}
    one_kind = found if len(kinds) == 1 else [x.to(row_dtype(device)) for x in found]
    return torch.stack(one_kind).to(row_dtype(device))


def _largest(x: Tensor) -> Tensor:
    """Of a tensor in host memory. Rows side by side are compared several at a time, one long row is not."""
    ends = []
    for chunk in chunks(x, _CACHED):
        cut = len(chunk) - len(chunk) % _ROW
        if cut:
            rows = chunk[:cut].view(-1, _ROW)
            ends += [rows.amax(0), rows.amin(0).neg_()]
        ends += [chunk[cut:], chunk[cut:].neg()]
    return torch.cat(ends).amax()


def sum_squares(x: Tensor) -> Tensor:
    """The row of `SQUARES` of one tensor: shape (2,), `row_dtype`, within 1e-6, on the device of `x`.

    Costs 0.2 ns an element for finite float32 in host memory, 0.4 of 16 bits, else as much as `finite_sums`. Traces in
    a backward hook under `torch.compile`, by way of `moments`, which leaves compiled weights bitwise as they are.
    """
    if torch.compiler.is_compiling():
        return moments.squares_operator(x)
    x = real(x)
    if fused.applies_to(x):
        return fused.rows([x])[0, fused.SQUARES]
    row = dense.sums(x) if dense.applies_to(x) else None
    if row is not None:
        return torch.tensor(row, dtype=torch.float64, device=x.device)
    squares, _, nonfinite, count = finite_sums([x])[0].unbind()
    return moments.row_of_squares(squares, nonfinite, count)


def combine_squares(a: Tensor, b: Tensor) -> Tensor:
    """The row of two tensors' elements together, from the row of each: shapes (..., 2), broadcast.

    As of the concatenation: a NaN gives way to the other's sum (to an empty tensor's 0, too).
    """
    both = a + b
    squares = torch.where(a.isnan(), b, torch.where(b.isnan(), a, both))[..., :1]
    return torch.cat((squares, both[..., 1:]), dim=-1)


def _sums(tensors: Sequence[Tensor], *, absolute: bool) -> Tensor:
    """Of real tensors sum_squares, nonfinite and, where wanted, sum_abs: shape (n, 2 or 3)."""
    device = _common_device(tensors)
    if fused.applies_to(*tensors):
        rows = fused.rows(tensors)
        (squares, magnitudes), nonfinite = rows[:, fused.SUMS].unbind(-1), rows[:, fused.SQUARES][:, 1]
        return torch.stack((squares, nonfinite, magnitudes) if absolute else (squares, nonfinite), dim=-1)
    found = _finite_sums(tensors, absolute=absolute) if device.type == "cpu" else {}
    rest = [i for i in range(len(tensors)) if i not in found]
    if not found:
        return _careful_sums(tensors, device, absolute=absolute)
    if rest:
        rows = _careful_sums([tensors[i] for i in rest], device, absolute=absolute)
        found.update(zip(rest, rows.tolist(), strict=True))  # in host memory, as the others
    return torch.tensor([found[i] for i in range(len(tensors))], dtype=row_dtype(device), device=device)


def _finite_sums(tensors: Sequence[Tensor], *, absolute: bool) -> dict[int, Sequence[float]]:
    """The rows, by index, of those in host memory whose elements are all finite, where a look shows it.

    Small ones take one operation for all, in float64, in which norms of a narrower type neither vanish nor overflow.
    """
    usual = [(i, x, x.numel()) for i, x in enumerate(tensors) if x.dtype in dense.TYPES and type(x) in PLAIN]
    sums = {i: dense.sums(x, absolute=absolute) for i, x, n in usual if n >= _FEW}
    found: dict[int, Sequence[float]] = {i: row for i, row in sums.items() if row is not None}
    small = [i for i, _, n in usual if 0 < n < _FEW]
    if small:
        some = [tensors[i] for i in small]
        squares = torch.stack(torch._foreach_norm(some, 2, torch.float64)).square().tolist()
        magnitudes = torch.stack(torch._foreach_norm(some, 1, torch.float64)).tolist() if absolute else squares
        rows = zip(small, squares, magnitudes, strict=True)
        found.update((i, (s, 0.0, m) if absolute else (s, 0.0)) for i, s, m in rows if s < math.inf)
    return found


def _careful_sums(tensors: Sequence[Tensor], device: torch.device, *, absolute: bool) -> Tensor:
    """The same where elements may not be finite, and on any device."""
    scratch = Scratch.for_elements_of(tensors, device)
    room = torch.empty_like(scratch.values)
    chunks_of = [0] * len(tensors)
    rows = [scratch.wide.new_zeros(0, 3 if absolute else 2)]
    for pack in _packs(tensors, len(scratch.values)):
        lengths = [chunk.shape[0] for _, chunk in pack]
        packed = _packed([chunk for _, chunk in pack], lengths, room[: sum(lengths)])
        rows.append(_sums_of_packed(packed, scratch.first(len(packed)), lengths, absolute=absolute))
        for owner, _ in pack:
            chunks_of[owner] += 1
    if chunks_of == [1] * len(tensors):
        return torch.cat(rows)
    return torch.stack([of_one.sum(0) for of_one in torch.cat(rows).split(chunks_of)])


def _packs(tensors: Sequence[Tensor], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """All elements, at most `size` at a time: chunks with the index of the tensor that each is from, in order."""
    pack: list[tuple[int, Tensor]] = []
    room = size
    for owner, x in enumerate(tensors):
        for chunk in chunks(x, size):
            if chunk.shape[0] > room:
                yield pack
                pack, room = [], size
            pack.append((owner, chunk))
            room -= chunk.shape[0]
    if pack:
        yield pack


def _packed(some: list[Tensor], lengths: Sequence[int], room: Tensor) -> Tensor:
    """Chunks as one tensor of the type of `room`: copied there, unless there is one only, readable in place."""
    if len(some) == 1 and some[0].dtype == room.dtype:
        return some[0]
    torch._foreach_copy_(room.split_with_sizes(lengths), some)
    return room


def _sums_of_packed(packed: Tensor, scratch: Scratch, lengths: Sequence[int], *, absolute: bool) -> Tensor:
    values, wide = scratch
    wide.copy_(torch.nan_to_num(packed, 0.0, 0.0, 0.0, out=values))
    nonfinite = _totals(torch.ne(packed, values, out=values), lengths).to(wide)
    sums_abs = [_totals(wide.abs_(), lengths)] if absolute else []
    return torch.stack((_totals(wide.square_(), lengths), nonfinite, *sums_abs), dim=-1)


def _totals(packed: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums of non-negative elements over consecutive lengths: the L1 norm is what is fused for many tensors."""
    if packed.is_cpu and len(lengths) > 1:
        cuts = torch.tensor(lengths, device=packed.device)
        return torch.segment_reduce(packed, "sum", lengths=cuts, unsafe=True)
    return torch.stack([packed.sum()] if packed.is_cpu else torch._foreach_norm(packed.split_with_sizes(lengths), 1))


def _minus(subtrahend: Tensor, minuends: Sequence[int]) -> Tensor:
    """minuends - subtrahend without copying a list to the device, which would wait for it."""
    if not minuends:
        return subtrahend
    if subtrahend.is_cpu:
        return torch.tensor(minuends, dtype=subtrahend.dtype, device=subtrahend.device) - subtrahend
    return torch.stack(torch._foreach_add((-subtrahend).unbind(), [float(n) for n in minuends]))


def _common_device(tensors: Sequence[Tensor]) -> torch.device:
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"tensors: got tensors on {', '.join(sorted(map(str, devices)))}, takes those of one device; "
            "call once for each device"
        )
    return devices.pop() if devices else torch.device("cpu")
