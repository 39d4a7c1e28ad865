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
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result
