"""Sums over each of many tensors at once: all gradients or all parameters of a model.

Large tensors are cut up and small ones packed together, so that each operation has a cache's worth of elements. They
are copied once, into scratch memory that is used again and again; all arithmetic happens there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from torchprobe.statistics import dense
from torchprobe.statistics.dtypes import Scratch, pieces, real

FIELDS = ("sum_squares", "sum_abs", "nonfinite", "count")
"""Columns of `finite_sums`. The sums and the count are over the finite elements."""

_Reduction: TypeAlias = "Callable[[Tensor, Scratch, Sequence[int]], Tensor]"
"""From packed elements, scratch of their size and the lengths at which to cut them: sums, (lengths, columns)."""


_Row: TypeAlias = "tuple[float, ...] | None"
"""Sums of one tensor, in float64; None where it is not the common case of `dense`."""

_SMALL = 2**12
"""Tensors of fewer elements are cheaper packed together."""


def finite_sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sums of each tensor, as `FIELDS` says: shape (n, 4), `row_dtype`, on the tensors' device.

    The tensors are any strided floating or complex ones of one device, of any mixture of types, shapes and layouts.
    Sums are exact to 1e-14, and to 1e-6 for large finite float32 tensors in host memory (see `dense`), which take
    0.2 ns an element on two CPU cores; others take 1.1 ns, and 18 µs a tensor. Counts are exact. float64 elements
    above 1e154 may give an infinite sum_squares.

    Makes no host read. Raises TypeError for integers and ValueError for tensors on several devices.
    """
    tensors = [real(x) for x in tensors]

    def fast(i: int) -> _Row:
        sums = dense.sums(tensors[i])
        return sums and (*sums, 0.0, float(tensors[i].numel()))

    return _rows(tensors, fast, lambda rest: _careful_sums([tensors[i] for i in rest]))


def l2_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm over the finite elements of each tensor: shape (n,), `row_dtype`.

    Takes, promises and raises what `finite_sums` does, at 0.1 ns an element where that takes 0.2, else at 0.7.
    """
    tensors = [real(x) for x in tensors]

    def fast(i: int) -> _Row:
        squares = dense.sum_squares(tensors[i])
        return None if squares is None else (squares,)

    return _rows(tensors, fast, lambda rest: _careful_squares([tensors[i] for i in rest]))[:, 0].sqrt()


def distances(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """L2 norms over the finite elements of other - x and of other, pair by pair: shape (n, 2), `row_dtype`.

    Takes, promises and raises what `l2_norms` does, of pairs of equal shapes; overwrites some of `others` with the
    differences, so that no room for them is needed. Costs 0.3 ns an element where `l2_norms` takes 0.1.
    """

    def fast(i: int) -> _Row:
        x, other = tensors[i], others[i]
        alike = dense.applies_to(x) and x.is_contiguous() and other.is_contiguous()
        return dense.distance(x, other) if alike else None

    def careful(rest: Sequence[int]) -> Tensor:
        some = [others[i] for i in rest]
        size = _careful_squares([real(x) for x in some])
        if some:
            torch._foreach_sub_(some, [tensors[i] for i in rest])
        return torch.cat((_careful_squares([real(x) for x in some]), size), dim=1)

    return _rows(others, fast, careful).sqrt()


def _rows(tensors: Sequence[Tensor], fast: Callable[[int], _Row], careful: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """A row for each tensor: from `fast` where that has one, the others together from `careful`."""
    _common_device(tensors)
    large = (i for i, x in enumerate(tensors) if x.numel() >= _SMALL and dense.applies_to(x))
    found = {i: row for i in large if (row := fast(i)) is not None}
    rest = [i for i in range(len(tensors)) if i not in found]
    rows = careful(rest)
    if not found:
        return rows
    rows = torch.cat((rows, torch.tensor([*found.values()], dtype=rows.dtype, device=rows.device)))
    places = torch.tensor([*rest, *found], device=rows.device)
    return torch.empty_like(rows).index_copy_(0, places, rows)


def _careful_squares(tensors: Sequence[Tensor]) -> Tensor:
    return _reduced(tensors, _squares, columns=1)


def _careful_sums(tensors: Sequence[Tensor]) -> Tensor:
    squares, absolute, nonfinite = _reduced(tensors, _all_sums, columns=3).unbind(-1)
    count = _minus(nonfinite, [x.numel() for x in tensors])
    return torch.stack((squares, absolute, nonfinite, count), dim=-1)


def _reduced(tensors: Sequence[Tensor], reduction: _Reduction, columns: int) -> Tensor:
    """The reduction of every tensor: shape (n, columns)."""
    scratch = Scratch.for_elements_of(tensors, _common_device(tensors))
    room = torch.empty_like(scratch.values)
    owners: Counter[int] = Counter()
    rows = [scratch.wide.new_zeros(0, columns)]
    for pack in _packs(tensors, len(scratch.values)):
        lengths = [piece.numel() for _, piece in pack]
        packed = _packed([piece for _, piece in pack], lengths, room[: sum(lengths)])
        rows.append(reduction(packed, scratch.part(len(packed)), lengths))
        owners.update(owner for owner, _ in pack)
    pieces_of = [owners[i] for i in range(len(tensors))]
    if all(count == 1 for count in pieces_of):
        return torch.cat(rows)
    return torch.stack([part.sum(0) for part in torch.cat(rows).split(pieces_of)])


def _packs(tensors: Sequence[Tensor], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """All elements in portions of at most `size`: pieces with the index of the tensor that each is from, in order."""
    pack: list[tuple[int, Tensor]] = []
    room = size
    for owner, x in enumerate(tensors):
        for piece in pieces(x, size):
            if piece.numel() > room:
                yield pack
                pack, room = [], size
            pack.append((owner, piece))
            room -= piece.numel()
    if pack:
        yield pack


def _packed(parts: list[Tensor], lengths: Sequence[int], room: Tensor) -> Tensor:
    """The parts as one tensor of the type of `room`: copied there, unless there is one only, readable in place."""
    if len(parts) == 1 and parts[0].dtype == room.dtype:
        return parts[0]
    torch._foreach_copy_(room.split_with_sizes(lengths), parts)
    return room


def _all_sums(packed: Tensor, scratch: Scratch, lengths: Sequence[int]) -> Tensor:
    values, wide = scratch
    flags = torch.sub(packed, packed, out=values).nan_to_num_(1.0)  # x - x is 0 if x is finite, else NaN
    nonfinite = _totals(flags, lengths)
    absolute = _totals(wide.copy_(torch.nan_to_num(packed, 0.0, 0.0, 0.0, out=values).abs_()), lengths)
    return torch.stack((_totals(wide.square_(), lengths), absolute, nonfinite.to(wide)), dim=-1)


def _squares(packed: Tensor, scratch: Scratch, lengths: Sequence[int]) -> Tensor:
    values, wide = scratch
    finite = torch.nan_to_num(packed, 0.0, 0.0, 0.0, out=values)
    return _totals(wide.copy_(finite).square_(), lengths)[:, None]


def _totals(packed: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums of non-negative elements over consecutive lengths: the L1 norm is what is fused for many tensors."""
    if packed.is_cpu and len(lengths) > 1:
        cuts = torch.tensor(lengths, device=packed.device)
        return torch.segment_reduce(packed, "sum", lengths=cuts, unsafe=True)
    parts = packed.split_with_sizes(lengths)
    return torch.stack([packed.sum()] if packed.is_cpu else torch._foreach_norm(parts, 1))


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
