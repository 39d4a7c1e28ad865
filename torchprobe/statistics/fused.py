"""Statistics of tensors on a GPU in one read, by Triton's kernels; elsewhere, and where Triton is not, not at all.

Operations of torch would each read the elements again and write temporaries, and a launch costs more than most
tensors' arithmetic. Here all tensors of one type take one launch, and no memory but a few thousand rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.messages import log as _log
from torchprobe.statistics.dtypes import GPUS, PLAIN, moved

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Others are rare on a GPU, and computed by torch's operations."""

COLUMNS, CODES = 13, 256  # as in `kernels`

MOMENTS, SUMS, ENDS, SQUARES = slice(0, 7), slice(7, 9), slice(9, 11), slice(11, 13)
"""Columns of `rows`: those of `moments.FIELDS`; the sums of squares and of magnitudes; the smallest and the largest
element, 0 where none is finite; those of `norms.SQUARES`."""

LINES = 2**7
"""Lines of sums that stay in place: the most programs of a launch that adds to them. Each costs time, flag or not."""

_PROGRAMS, _BLOCK, _MERGED = 2**11, 2**10, 2**7  # programs that a launch aims at, elements at a time, rows at a time


def applies_to(*tensors: Tensor) -> bool:
    """Whether `dtypes.real` tensors of one device can be read so. Looks at no element."""
    kind = tensors[0].device.type if tensors else ""
    return kind in GPUS and usable(kind) and all([_is_readable(x) for x in tensors])  # noqa: C419 - a call a tensor


def _is_readable(x: Tensor) -> bool:
    plain = x.dtype in TYPES and type(x) in PLAIN and (x.is_contiguous() or _is_dense(x))
    return plain and (x.data_ptr() != 0 or not x.numel())


@functools.cache
def usable(kind: str) -> bool:
    """Whether Triton is there and its kernels compile and run on a device of this kind; said once where they do not."""
    try:
        rows([torch.zeros(1, device=kind)])
    except ImportError:
        return False
    except Exception:
        _log.warning("Triton's kernels do not run on %s: statistics take longer, by torch's operations", kind)
        _log.debug("what Triton said", exc_info=True)
        return False
    return True


def rows(tensors: Sequence[Tensor]) -> Tensor:
    """The row of each tensor's finite elements, (n, COLUMNS), float64, on its device. No host read.

    The tensors are of one device, and `applies_to` each. Counts and extremes are exact, sums to 1e-14.
    """
    return _in_order(_rows, tensors)


def lines(device: torch.device, tensors: int = 0) -> Tensor:
    """Memory for `add`, or for `add_all` of so many tensors: zeros. The number in the last line is the flag."""
    return torch.zeros(LINES + tensors + 1, COLUMNS, dtype=torch.float64, device=device)


def add(x: Tensor, lines: Tensor) -> None:
    """Add the elements of a tensor to lines that stay in place, unless their flag is 0 when that runs.

    `applies_to` the tensor. One launch, nothing allocated and nothing copied: a graph of the device may hold it.
    """
    from torchprobe.statistics import kernels

    launch = Launch([x], len(lines) - 1)
    if launch.programs:
        with _on(x.device):
            kernels.sums[(launch.programs,)](x, x, lines, lines[-1], **launch.options, gated=1)


def add_all(x: Tensor, lines: Tensor, places: Tensor, programs: int, span: int) -> None:
    """The same of all tensors of the type of `x` that `places` names when it runs: see `Launch.table`."""
    from torchprobe.statistics import kernels

    options = {"elements": 0, "span": span, "ADDRESSED": True, "BLOCK": _BLOCK}
    with _on(x.device):
        kernels.sums[(programs,)](x, places, lines, lines[-1], **options, gated=1)


def all_added(lines: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The row of what was added to each, as `rows` has them, and of how many tensors it is: (n, COLUMNS), (n,)."""
    partial = torch.cat(list(lines))
    each = len(lines[0])
    partial[each - 1 :: each] = 0.0  # the flags
    return added(partial, torch.arange(0, len(partial) + 1, each, device=partial.device))


def added(lines: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The same of tensors whose lines end there."""
    from torchprobe.statistics import kernels

    out = torch.empty(len(ends) - 1, COLUMNS, dtype=torch.float64, device=lines.device)
    with _on(lines.device):
        kernels.merged[(len(out),)](lines, ends, out, 0, ADDRESSED=True, BLOCK=_MERGED)
    return out, lines[:, 3].index_select(0, ends[:-1])


def codes(tensors: Sequence[Tensor]) -> Tensor:
    """Of each tensor how many elements have each exponent code of float32, and how many are not 0: (n, 257), int64."""
    return _in_order(functools.partial(_counted, "exponents", CODES + 1), tensors)


def counts(tensors: Sequence[Tensor], grid: Tensor, buckets: int) -> Tensor:
    """Of each tensor how many elements each bucket of a grid has, and how many are not finite: (n, buckets + 1), int64.

    grid: of each tensor the number of the first bucket, and how many fit into 1, a power of two: (n, 2), float64.
    buckets: a power of two.
    """
    return _in_order(functools.partial(_counted, "bins", buckets + 1, BINS=2 * buckets), tensors, grid)


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    from torchprobe.statistics import kernels

    x, launch = tensors[0], Launch(tensors, _PROGRAMS)
    places, ends = launch.table() if launch.addressed else (x, x)
    out = torch.empty(len(tensors), COLUMNS, dtype=torch.float64, device=x.device)
    partial = torch.empty(max(launch.programs, 1), COLUMNS, dtype=torch.float64, device=x.device)
    with _on(x.device):
        if launch.programs:
            kernels.sums[(launch.programs,)](x, places, partial, partial, **launch.options, gated=0)
        many = (partial, ends, out, launch.programs)
        kernels.merged[(len(tensors),)](*many, ADDRESSED=launch.addressed, BLOCK=_MERGED)
    return out


def _counted(kernel: str, width: int, tensors: Sequence[Tensor], *grid: Tensor, **sizes: int) -> Tensor:
    """Counts that a kernel adds to a row of each tensor: (n, width), int64."""
    from torchprobe.statistics import kernels

    x, launch = tensors[0], Launch(tensors, _PROGRAMS)
    places, _ = launch.table() if launch.addressed else (x, x)
    out = torch.zeros(len(tensors), width, dtype=torch.int64, device=x.device)
    if launch.programs:
        with _on(x.device):
            getattr(kernels, kernel)[(launch.programs,)](x, places, *grid, out, **launch.options, **sizes)
    return out


class Launch:
    """Which program reads what: a table on the device, or by its number where there is one tensor."""

    def __init__(self, tensors: Sequence[Tensor], programs: int, addressed: bool | None = None) -> None:
        x = tensors[0]
        sizes = [tensor.numel() for tensor in tensors]
        span = -(-sum(sizes) // programs)
        self.span = max(-(-span // _BLOCK), 1) * _BLOCK
        self.addressed = len(tensors) > 1 if addressed is None else addressed
        self.elements = sizes[0]
        self.programs = sum([-(-size // self.span) for size in sizes])
        self._of = sizes, x.element_size(), x.device
        self._addresses = [tensor.data_ptr() for tensor in tensors] if self.addressed else []

    def table(self) -> tuple[Tensor, Tensor]:
        """On the device: what each program reads, (programs, 3), and where the programs of each tensor end."""
        sizes, width, device = self._of
        places, ends = _table(np.array(self._addresses), np.array(sizes), self.span, width)
        table = moved(torch.from_numpy(np.concatenate((places.reshape(-1), ends))), device)
        return table[: places.size].view(-1, 3), table[places.size :]

    @property
    def options(self) -> dict[str, Any]:
        """What kernels are called with."""
        return {"elements": self.elements, "span": self.span, "ADDRESSED": self.addressed, "BLOCK": _BLOCK}


def _table(
    addresses: NDArray[np.int64], sizes: NDArray[np.int64], span: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What each program reads, (programs, 3): address, length, tensor; and where the programs of each tensor end."""
    each = -(-sizes // span)
    ends = np.concatenate(([0], np.cumsum(each)))
    owner = np.repeat(np.arange(len(sizes)), each)
    start = (np.arange(ends[-1]) - ends[owner]) * span
    length = np.minimum(sizes[owner] - start, span)
    return np.stack((addresses[owner] + start * width, length, owner), axis=1), ends


def _in_order(function: Callable[..., Tensor], tensors: Sequence[Tensor], *beside: Tensor) -> Tensor:
    """A row for each tensor, by a launch for those of each type. beside: rows of the function's own, in that order."""
    if len({x.dtype for x in tensors}) == 1:
        return function(tensors, *beside)
    groups: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        groups.setdefault(x.dtype, []).append(i)
    by_index: dict[int, Tensor] = {}
    for group in groups.values():
        own = [torch.stack([rows[i] for i in group]) for rows in beside]
        by_index.update(zip(group, function([tensors[i] for i in group], *own), strict=True))
    return torch.stack([by_index[i] for i in range(len(tensors))])


def _is_dense(x: Tensor) -> bool:
    """Whether its elements, in some order, lie side by side, each once."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels go to the current device's current stream. In host memory Triton's interpreter runs them."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
