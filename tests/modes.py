"""Dispatch modes that watch the operations run inside them."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostRead(TorchDispatchMode):
    """Fails on an operation that makes the host wait for a device value."""

    FORBIDDEN = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.FORBIDDEN, "host read"
        return function(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The most elements that one operation allocated."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max(self.elements, _allocated(result, args, kwargs))
        return result


class Allocations(TorchDispatchMode):
    """How many operations allocated so many elements or more."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += _allocated(result, args, kwargs) >= self.elements
        return result


def _allocated(result, args, kwargs) -> int:
    """Elements of the memory of a result that is in none of the arguments' memory."""
    known = {_address(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
    if not isinstance(result, torch.Tensor) or _address(result) in known:
        return 0
    return result.untyped_storage().nbytes() // result.element_size()


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
