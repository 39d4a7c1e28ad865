"""Whether two forward passes had the same input: the same tensors, unchanged, and the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from torchprobe.capture.outputs import tensors_in


class InputKey:
    """What a pass was called with; keeps no tensor alive."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], weights_version: int) -> None:
        self._tensors: list[tuple[ReferenceType[Tensor], int]] = [
            (ref(tensor), _version(tensor)) for tensor in input_tensors(args, kwargs)
        ]
        self._plain = [part for part in (*args, *kwargs.items()) if not _has_tensor(part)]
        self._weights = weights_version

    def same_as(self, other: InputKey) -> bool:
        """Whether both are certainly the same input; never so without a tensor in it."""
        if not self._tensors or len(self._tensors) != len(other._tensors) or self._weights != other._weights:
            return False
        pairs = zip(self._tensors, other._tensors, strict=True)
        same = all(a() is not None and a() is b() and n == m for (a, n), (b, m) in pairs)
        return same and _equal(self._plain, other._plain)


def input_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor that a module was called with."""
    return [*tensors_in(tuple(args)), *tensors_in(dict(kwargs))]


def _has_tensor(part: Any) -> bool:
    return next(tensors_in(part), None) is not None


def _equal(a: list[Any], b: list[Any]) -> bool:
    """Of simple values; anything else has to be the same object."""
    return len(a) == len(b) and all(x is y or (_simple(x) and _simple(y) and x == y) for x, y in zip(a, b, strict=True))


def _simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_simple, value))
    return value is None or isinstance(value, str | int | float | bool)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
