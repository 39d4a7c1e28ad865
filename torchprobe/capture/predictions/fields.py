"""Reads an output: a distribution, named fields, or the tensor that it is or begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.predictions.distributions import read_distribution
from torchprobe.capture.predictions.names import MEANS, PROBABILITIES, Quantity, meaning_of, words_of
from torchprobe.capture.predictions.reading import Reading

_DEPTH = 2


def read(output: Any) -> Reading:
    """What an output says."""
    distribution = _first_distribution(output)
    if distribution is not None:
        return read_distribution(distribution)
    reading = _read_fields(dict(fields_of(output)))
    if reading.plain is None and not reading.says_something:
        tensor = main_tensor(output)
        reading.plain = tensor if tensor is not None and not tensor.is_complex() else None
    return reading


def fields_of(output: Any, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Named floating tensors of a mapping, dataclass or named tuple, and of such inside it."""
    for name, part in _items(output):
        if isinstance(part, Tensor):
            if part.is_floating_point():
                yield name, part
        elif depth < _DEPTH:
            yield from fields_of(part, depth + 1)


def _items(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((str(name), part) for name, part in output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))


def _read_fields(fields: dict[str, Tensor]) -> Reading:
    reading = Reading()
    for name, tensor in fields.items():
        meaning = meaning_of(name)
        if meaning is not None:
            if meaning.quantity == "variance" and reading.source is None:
                reading.source = tensor, meaning.spread
            _put(reading, meaning.quantity, meaning.convert(_wide(tensor)))
    reading.nu = _with_words(fields, {"nu", "v"}) if reading.alpha is not None else None
    reading.beta = _with_words(fields, {"beta"}) if reading.nu is not None else None
    if reading.variance is not None:
        reading.mean_in_graph = _mean_for(fields, reading.variance)
        reading.mean = None if reading.mean_in_graph is None else reading.mean_in_graph.detach()
    if "logits" in fields:
        reading.plain, reading.form = fields["logits"], "logits"
    else:
        reading.plain = _with_words(fields, PROBABILITIES, without="log", detach=False)
        reading.form = "" if reading.plain is None else "probabilities"
    return reading


def _put(reading: Reading, quantity: Quantity, values: Tensor) -> None:
    """The first field of a kind counts."""
    if quantity in ("epistemic", "aleatoric", "total"):
        reading.named.setdefault(quantity, values)
    elif quantity == "variance" and reading.variance is None:
        reading.variance = values
    elif quantity == "alpha" and reading.alpha is None:
        reading.alpha = values
    elif quantity == "kl" and reading.kl is None and values.numel() == 1:
        reading.kl = values


def _mean_for(fields: Mapping[str, Tensor], variance: Tensor) -> Tensor | None:
    """The prediction that a variance belongs to: by its name, and of the same shape."""
    means = (x for name, x in fields.items() if words_of(name) & MEANS and meaning_of(name) is None)
    return next((x for x in means if x.shape == variance.shape), None)


def _with_words(fields: Mapping[str, Tensor], words: set[str], without: str = "", detach: bool = True) -> Tensor | None:
    found = next((x for name, x in fields.items() if words_of(name) & words and without not in words_of(name)), None)
    return _wide(found) if found is not None and detach else found


def _first_distribution(output: Any) -> Distribution | None:
    if isinstance(output, Distribution):
        return output
    parts = output if isinstance(output, tuple | list) else [part for _, part in _items(output)]
    return next((part for part in parts if isinstance(part, Distribution)), None)


def _wide(tensor: Tensor) -> Tensor:
    """Detached, and in float32 or wider: a variance must not overflow."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
