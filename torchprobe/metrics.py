"""What the user logs: checked at the call, never read from the device."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Number: TypeAlias = "float | int | np.generic | np.ndarray | Tensor"

_log = logging.getLogger("torchprobe")


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
                yield tag, value.detach().clone().reshape(())
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
                tuple(value.shape),
                value.dtype,
            )


def _is_scalar(value: Tensor | np.ndarray) -> bool:
    if isinstance(value, np.ndarray):
        return value.size == 1 and value.dtype.kind in "fiub"
    # A DTensor's value is spread over ranks: fetching it is a collective, which is the user's to call.
    plain = value.layout is torch.strided and not hasattr(value, "full_tensor")
    return plain and value.numel() == 1 and not value.dtype.is_complex


def _as_float(value: float | np.generic | np.ndarray) -> float:
    number = value.item() if isinstance(value, np.generic | np.ndarray) else value
    try:
        return float(number)
    except OverflowError:  # a Python int beyond float64
        return math.inf if number > 0 else -math.inf


def _check_number(name: object, value: object) -> None:
    _check_text("metrics key", name)
    if not isinstance(value, Real | np.bool_ | np.ndarray | Tensor):
        raise TypeError(
            f"metrics[{name!r}]={value!r}: takes a number, a numpy scalar or a one-element tensor, "
            f"not {type(value).__name__}"
        )


def _check_text(argument: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument}={value!r}: takes a string, not {type(value).__name__}")
