"""Finds tensors in what a module returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

_MAX_DEPTH = 4  # deeper nesting than this is no output but a data structure


def main_tensor(output: Any) -> Tensor | None:
    """The tensor that stands for a module's output.

    That is the output itself, or the first floating or complex tensor with at least one dimension in
    a tuple, list, mapping (HuggingFace's ModelOutput is one) or dataclass; None when there is none.
    """
    if isinstance(output, Tensor):
        return output if is_numeric(output) else None
    return next((t for t in tensors_in(output) if is_numeric(t) and t.dim() > 0), None)


def is_numeric(tensor: Tensor) -> bool:
    """Whether a tensor holds floating or complex numbers."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def tensors_in(output: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every tensor in a nested output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif depth < _MAX_DEPTH:
        for part in _parts(output):
            yield from tensors_in(part, depth + 1)


def _parts(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    if isinstance(output, tuple | list):
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    return ()


def loss_in(output: Any) -> Tensor | None:
    """The `loss` field of a mapping or object that a model returns, when it is a scalar tensor."""
    if isinstance(output, Tensor | tuple | list) and not hasattr(output, "_fields"):
        return None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and is_numeric(loss) else None
