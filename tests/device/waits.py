"""What makes the host wait for a GPU: a list of operations, and whose code calls them.

A user's program may wait for its device as it likes. torchprobe's must not, but for the drain thread: the call raises,
and is kept in `found`, since an exception in a probe ends that probe alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import torchprobe

_T = TypeVar("_T")

found: list[str] = []
"""What our code waited for since the last test."""

_OURS = str(Path(torchprobe.__file__).parent)
_BETWEEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
_PAGEABLE = 2**16  # bytes: up to here the driver takes a copy of its own and returns

# Their result has a shape, or a Python value, that depends on the elements. From torch's CUDA kernels.
_READS = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero", "nonzero_numpy", "argwhere", "masked_select",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "histc",
    "_linalg_check_errors", "mode", "coalesce", "_coalesce", "segment_reduce",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_LOOKED_AT = _READS | _INDEXING | {"repeat_interleave", "copy_", "_to_copy", "_foreach_copy_"}


def by_identity(look_up: Callable[[Any], _T]) -> Callable[[Any], _T]:
    """A cache for operations, whose own hash is a call of Python; it keeps them, so that no other has their `id`."""
    known: dict[int, tuple[Any, _T]] = {}

    def cached(function: Any) -> _T:
        entry = known.get(id(function))
        if entry is None:
            entry = known[id(function)] = (function, look_up(function))
        return entry[1]

    return cached


@by_identity
def short_name(function: Any) -> str:
    """Without its namespace."""
    name: str = function._schema.name
    return name.split("::")[1]


class WaitError(RuntimeError):
    """Our code on the training thread would wait for the device."""


def host_reads(what: str) -> None:
    """Somebody is about to wait: raises `WaitError` where it is code of ours, outside of the drain thread."""
    where = ours()
    if where is not None:
        found.append(f"{what} at {where}")
        raise WaitError(found[-1])


def look_at(function: Any, args: Any, kwargs: Any, operands: list[Tensor]) -> None:
    """The same for an operation that is about to run."""
    name = short_name(function)
    if name not in _LOOKED_AT:
        return
    if name in _READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        host_reads(name)
    elif name in _INDEXING and any(_is_read(index) for index in args[1] if index is not None):
        host_reads(f"{name} by booleans, or by numbers in host memory")
    elif name == "copy_":
        _look_at_copy(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    elif name == "_to_copy" and "device" in kwargs:
        _look_at_copy(kwargs["device"], args[0], kwargs.get("non_blocking", False))
    elif name == "_foreach_copy_":
        for to, of in zip(args[0], args[1], strict=True):
            _look_at_copy(to, of, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))


def _is_read(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8) or (index.device.type == "cpu" and index.dim() > 0)


def _look_at_copy(to: Any, of: Tensor, non_blocking: bool) -> None:
    there = to.device if isinstance(to, Tensor) else torch.device(to)
    if (there.type == "cpu") == (of.device.type == "cpu"):
        return  # within host memory, or between devices, which order themselves
    host = of if of.device.type == "cpu" else to
    pinned = isinstance(host, Tensor) and host.is_pinned()
    small = of.device.type == "cpu" and of.nbytes <= _PAGEABLE
    if not non_blocking or not (pinned or small):
        host_reads(f"a copy from {of.device} to {there}")


def ours() -> str | None:
    """The line of our code that called, outside of the drain thread; None where somebody else's lies between."""
    if threading.current_thread().name.startswith("torchprobe"):
        return None
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(_OURS):
        return None
    if frame.f_code.co_name == "__torch_function__":  # it hands on what the user calls
        return None
    return f"{frame.f_code.co_filename[len(_OURS) + 1 :]}:{frame.f_lineno}"
