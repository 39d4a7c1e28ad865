"""What a user hands in: checked at the call, never read from the device.

Each error names the argument, what it got and what it takes.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from torchprobe.buffer.transfer import records_graph
from torchprobe.messages import log as _log
from torchprobe.statistics.dtypes import on_host
from torchprobe.statistics.uncertainty import Decomposition

Number: TypeAlias = "float | int | np.generic | np.ndarray | Tensor"

_IGNORED = -100
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # which few operators take
_T = TypeVar("_T")


def checked(argument: str, value: object, kind: type[_T]) -> _T:
    """The value itself. Raises TypeError when it is of another kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument}={value!r}: takes a {kind.__name__}, not {type(value).__name__}")
    return value


class Metrics:
    """Turns `log_metrics` arguments into tags and values, and warns once about each that is no scalar."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def tagged(self, metrics: Mapping[str, Number], prefix: str) -> Iterator[tuple[str, float | Tensor]]:
        """(tag, value) for every metric; a tensor or array of several elements is dropped with a warning.

        Raises TypeError for a value that is not a number, before anything is logged.
        """
        if not isinstance(metrics, Mapping):
            raise TypeError(f"metrics={metrics!r}: takes a mapping of names to numbers, such as {{'loss': loss}}")
        _check_text("prefix", prefix)
        for name, value in metrics.items():
            _check_number(name, value)
        start = f"{prefix}/" if prefix else ""
        for name, value in metrics.items():
            tag = start + name
            if isinstance(value, Tensor | np.ndarray) and not _is_scalar(value):
                self._warn(tag, value)
            elif isinstance(value, Tensor):
                yield tag, value if records_graph() else value.detach().clone().reshape(())
            else:
                yield tag, _as_float(value)

    def _warn(self, tag: str, value: Tensor | np.ndarray) -> None:
        if tag not in self._warned:
            self._warned.add(tag)
            _log.warning(
                "metric %s is dropped: a %s of shape %s, type %s; a metric is one real number "
                "(log a mean, say, or the full_tensor() of a DTensor)",
                tag,
                type(value).__name__,
                "nested" if isinstance(value, Tensor) and value.is_nested else tuple(value.shape),
                value.dtype,
            )


def _is_scalar(value: Tensor | np.ndarray) -> bool:
    if isinstance(value, np.ndarray):
        return value.size == 1 and value.dtype.kind in "fiub"
    if value.is_nested or value.is_meta:
        return False
    # A DTensor's value is spread over ranks: fetching it is a collective, which is the user's to call.
    plain = value.layout is torch.strided and not hasattr(value, "full_tensor")
    return plain and value.numel() == 1 and not value.dtype.is_complex


def _as_float(value: float | np.generic | np.ndarray) -> float:
    if isinstance(value, np.ndarray) and np.ma.is_masked(value):
        return math.nan  # its item() is what the mask hides
    number = value.item() if isinstance(value, np.generic | np.ndarray) else value
    try:
        return float(number)
    except OverflowError:  # a Python int beyond float64
        return math.inf if number > 0 else -math.inf


def _check_number(name: object, value: object) -> None:
    _check_text("metrics key", name)
    if not isinstance(value, Real | np.bool_ | np.ndarray | Tensor) or isinstance(value, np.timedelta64):
        raise TypeError(
            f"metrics[{name!r}]={value!r}: takes a number, a numpy scalar or a one-element tensor, "
            f"not {type(value).__name__}"
        )


def _check_text(argument: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument}={value!r}: takes a string, not {type(value).__name__}")


def checked_predictions(probs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Predictions and targets as tensors of one device. Raises TypeError and ValueError that name the argument."""
    p, y = _tensor("probs", probs), _tensor("targets", targets)
    if not p.is_floating_point():
        raise TypeError(f"probs: got {p.dtype}, takes floating-point probabilities; class numbers go into targets")
    if y.is_complex():
        raise TypeError(f"targets: got {y.dtype}, takes class numbers")
    if y.is_meta and not p.is_meta:
        raise TypeError("targets: got a meta tensor, which holds no numbers; takes class numbers")
    fitting = p.shape == y.shape or (p.dim() > 0 and p.shape[:-1] == y.shape)
    if not fitting:
        raise ValueError(
            f"targets: got shape {tuple(y.shape)} for probs of shape {tuple(p.shape)}; takes that without the "
            "last dimension, the classes (probs.movedim(1, -1) puts them there)"
        )
    if p.dim() and not p.size(-1) and p.numel() < math.prod(p.shape[:-1]):
        raise ValueError(f"probs: got shape {tuple(p.shape)}, takes probabilities of at least one class")
    _look_at_classes(p, y)
    return p, y.to(p.device, non_blocking=True)


def _look_at_classes(p: Tensor, y: Tensor) -> None:
    """Say once of class numbers in host memory that they are none: such predictions are left out, and counted."""
    if not y.is_cpu or not y.numel() or y.dtype is torch.bool:
        return
    if p.shape == y.shape or p.size(-1) == 1:
        if on_host(((y < 0) | (y > 1)).logical_and_(y != _IGNORED).any()):
            _say("targets of a binary task hold other numbers than 0 to 1 (-100 is ignored); none of them counts")
        return
    classes = p.size(-1)
    if on_host(y.amax()) >= classes:
        _say(f"targets hold numbers that are no class of {classes} (0 to {classes - 1}); these are left out")
    if y.is_floating_point() and on_host((y != y.round()).any()):
        _say("targets hold fractions, which are no class numbers; these predictions are left out")


@functools.cache
def _say(text: str) -> None:
    _log.warning("%s", text)


def _tensor(argument: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return _dense(argument, value.detach())
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return _dense(argument, torch.from_numpy(np.ascontiguousarray(value)))
    got = textwrap.shorten(repr(value), 80)
    raise TypeError(f"{argument}={got}: takes a tensor or a numeric numpy array, not {type(value).__name__}")


def _dense(argument: str, value: Tensor) -> Tensor:
    """In a type that torch computes with. Raises TypeError for a layout that statistics cannot read."""
    if value.is_nested or value.layout is not torch.strided:
        layout = "a nested tensor" if value.is_nested else f"{value.layout}"
        raise TypeError(f"{argument}: got {layout}, takes a dense tensor (to_dense() or to_padded_tensor() makes one)")
    if value.dtype in _UNSIGNED:
        return value.long()
    return value.float() if value.is_floating_point() and value.element_size() == 1 else value


def floats(argument: str, value: Any) -> Tensor:
    """A tensor, numpy array or number as real floats, detached. Raises TypeError, naming the argument, for others."""
    if isinstance(value, Tensor):
        if not value.is_complex():
            return _dense(argument, value.detach() if value.is_floating_point() else value.detach().float())
    elif isinstance(value, np.ndarray | np.generic | int | float):
        array = np.asarray(value)
        if array.dtype.kind in "fiub":
            return torch.from_numpy(array.astype(np.promote_types(array.dtype, np.float32)))
    raise TypeError(f"{argument}={value!r}: takes a tensor, a numpy array or a number, not {type(value).__name__}")


def decomposition(epistemic: Any, aleatoric: Any) -> Decomposition:
    """As given, with their sum for the total where both are. Raises TypeError for what is no array of numbers."""
    e = floats("epistemic", epistemic)
    if aleatoric is None:
        return Decomposition(None, None, e)
    a = floats("aleatoric", aleatoric).to(e.device, non_blocking=True)
    if a.shape != e.shape:
        raise ValueError(f"aleatoric: got shape {tuple(a.shape)}, takes that of epistemic, {tuple(e.shape)}")
    wide = torch.promote_types(torch.promote_types(e.dtype, a.dtype), torch.float32)
    return Decomposition(e.to(wide) + a.to(wide), a, e)


def attention_layers(weights: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """One layer's probabilities, or those of several: from a mapping by its keys, from a sequence by place.

    Each as (batch, heads, queries, keys); three dimensions are those of heads that were averaged. Raises TypeError and
    ValueError for what is none.
    """
    if isinstance(weights, list | tuple):
        weights = dict(enumerate(weights))
    if isinstance(weights, Mapping):
        for key, layer in weights.items():
            yield from attention_layers(layer, f"{name}.{key}" if name else str(key))
    elif weights is not None:  # what some models return for a layer without attention
        tensor, name = floats("weights", weights), name or "attention"
        if tensor.dim() not in (3, 4):
            raise ValueError(
                f"weights of {name!r}: got shape {tuple(tensor.shape)}, takes probabilities of shape "
                "(batch, heads, queries, keys), or (batch, queries, keys) of averaged heads"
            )
        yield name, tensor.unsqueeze(1) if tensor.dim() == 3 else tensor
