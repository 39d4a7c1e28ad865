"""Finds tensors in what a module returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

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
        return [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    return ()


def hearable_tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor through which a backward pass may run: those of a plain object too, as it holds them."""
    if isinstance(output, Tensor):
        yield output
        return
    found = False
    for tensor in tensors_in(output):
        found = True
        yield tensor
    if not found and hasattr(output, "__dict__") and not isinstance(output, type | nn.Module):
        yield from tensors_in(list(vars(output).values()))  # never a property, which runs the user's code


def heads_beside(output: Any) -> dict[str, Tensor]:
    """Parts of a tuple or list that may be heads, by their numbers: rows of the same examples, and a loss at most."""
    parts = enumerate(output) if type(output) in (tuple, list) else ()
    heads = {str(i): x for i, x in parts if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0}
    kinds = {(x.dim(), x.shape[0], x.grad_fn is None) for x in heads.values()}
    return heads if len(heads) > 1 and len(kinds) == 1 and min(x.dim() for x in heads.values()) > 1 else {}
