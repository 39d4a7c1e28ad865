"""Finds tensors in what a module is called with and returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

_NO_TENSORS = (type(None), bool, int, float, str)  # nor what may hold some
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
    """Whether a tensor holds floating or complex numbers, and has a shape."""
    numbers = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return numbers and not (tensor.is_nested and is_shapeless(tensor))


def is_shapeless(nested: Tensor) -> bool:
    """Whether a nested tensor raises where it is asked for its shape; a jagged one does not."""
    return nested.layout is torch.strided


def tensors_in(output: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every tensor in a nested output that has a shape, in order."""
    if isinstance(output, Tensor):
        if not (output.is_nested and is_shapeless(output)):
            yield output
    elif depth < _MAX_DEPTH:
        for part in _parts(output):
            yield from tensors_in(part, depth + 1)


def given_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor that a module is called with and that has a shape, in order."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            if not (value.is_nested and is_shapeless(value)):
                found.append(value)
        elif type(value) not in _NO_TENSORS:
            found += tensors_in(value, 1)
    return found


def _parts(output: Any) -> Iterable[Any]:
    if isinstance(output, tuple | list):
        return output
    if isinstance(output, Mapping):
        return output.values()
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    return ()


def fields_of(output: Any, depth: int = 2) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a mapping, dataclass or named tuple, and of such inside it."""
    for name, part in named_parts(output):
        if isinstance(part, Tensor):
            yield name, part
        elif depth:
            yield from fields_of(part, depth - 1)


def named_parts(output: Any) -> Iterator[tuple[str, Any]]:
    """What a mapping, a dataclass or a named tuple holds, by name."""
    if isinstance(output, Mapping):
        yield from ((str(name), part) for name, part in output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from ((entry.name, getattr(output, entry.name)) for entry in dataclasses.fields(output))


def hearable_tensors(output: Any) -> list[Tensor]:
    """Every tensor through which a backward pass may run: those of distributions, and, where there is no other, of
    plain objects too, as they hold them.
    """
    return [*_in_graph(output, Distribution)] or [*_in_graph(output, object)]


def _in_graph(output: Any, opened: type, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output
    elif depth < _MAX_DEPTH and type(output) not in _NO_TENSORS:
        parts = _parts(output)
        if parts == () and isinstance(output, opened) and not isinstance(output, type | nn.Module):
            parts = list(getattr(output, "__dict__", {}).values())  # never a property, which runs the user's code
        for part in parts:
            yield from _in_graph(part, opened, depth + 1)


def heads_beside(output: Any) -> dict[str, Tensor]:
    """Parts of a tuple or list that may be heads, by their numbers: rows of the same examples, and a loss at most."""
    parts = enumerate(output) if type(output) in (tuple, list) else ()
    heads = {str(i): x for i, x in parts if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0}
    kinds = {(x.dim(), x.shape[0], x.grad_fn is None) for x in heads.values()}
    return heads if len(heads) > 1 and len(kinds) == 1 and min(x.dim() for x in heads.values()) > 1 else {}


def batch_sizes(inputs: Sequence[Tensor], output: Any) -> tuple[float, float]:
    """Rows that all inputs, and the first of the outputs, agree in, and tokens; NaN where it is not clear."""
    shaped = [tensor for tensor in inputs if tensor.dim() > 0]
    sizes = {tensor.shape[0] for tensor in shaped}
    of_output = next((tensor.shape[0] for tensor in tensors_in(output) if tensor.dim() > 0), None)
    if len(sizes) != 1 or of_output not in sizes or all(tensor.dim() == 1 for tensor in shaped):
        return math.nan, math.nan
    ids = {tensor.shape for tensor in shaped if tensor.dim() > 1 and tensor.dtype in (torch.int64, torch.int32)}
    mixed = any(tensor.dim() > 1 and tensor.is_floating_point() for tensor in shaped)
    shape = torch.Size(ids.pop() if len(ids) == 1 and not mixed else ())
    return float(sizes.pop()), float(shape.numel()) if len(shape) == 2 else math.nan
