"""Histograms of gradients and parameters, counted exactly on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.probes.base import Probe
from torchprobe.records import Histogram, Value
from torchprobe.statistics import histograms

_BUCKETS = 64


class GradientHistograms(Probe):
    """Magnitudes on a log10 axis, one bucket per binary exponent; zeros and non-finite counted beside it."""

    source: ClassVar[str] = "gradients"
    fields: ClassVar[tuple[str, ...]] = ("zeros", "nonfinite", "counts")
    reduce = "sum"
    default_every: ClassVar[int] = 500
    dense_start: ClassVar[bool] = False
    descriptions: Mapping[str, str] = {
        "gradients": "log10 of the gradient's magnitude (exact counts); zeros are in `gradients_zeros`.",
        "gradients_zeros": "Number of gradient elements that are exactly zero.",
        "gradients_nonfinite": "Number of NaN and inf gradient elements; only when not 0.",
    }

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """One row of counts a tensor."""
        return histograms.log_histograms(tensors)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """A histogram, the zeros, and the non-finite count when there is one."""
        edges, counts = np.asarray(histograms.log_edges()), rows[:, 2:].astype(np.int64)
        for name, (zeros, nonfinite), row in zip(names, rows[:, :2].tolist(), counts, strict=True):
            yield f"gradients/{name}", Histogram(edges, row)
            yield f"gradients_zeros/{name}", zeros
            if nonfinite:
                yield f"gradients_nonfinite/{name}", nonfinite


class ParameterHistograms(Probe):
    """Values on a linear axis of up to 64 buckets, whose width is a power of two."""

    source: ClassVar[str] = "parameters"
    fields: ClassVar[tuple[str, ...]] = ("low", "high", "nonfinite", "counts")
    default_every: ClassVar[int] = 500
    dense_start: ClassVar[bool] = False
    descriptions: Mapping[str, str] = {
        "parameters": "Values of the parameter after the step (exact counts).",
        "parameters_nonfinite": "Number of NaN and inf elements in the parameter; only when not 0.",
    }

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """One row of limits and counts a tensor."""
        return histograms.linear_histograms(tensors, _BUCKETS)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The histogram of two parts together, on the host: exact."""
        return torch.from_numpy(histograms.combine(a.numpy(), b.numpy()))

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """A histogram, and the non-finite count when there is one."""
        edges = histograms.linear_edges(rows[:, 0], rows[:, 1], _BUCKETS)
        counts = rows[:, len(histograms.HEADER) :].astype(np.int64)
        for name, nonfinite, *histogram in zip(names, rows[:, 2].tolist(), edges, counts, strict=True):
            yield f"parameters/{name}", Histogram(*histogram)
            if nonfinite:
                yield f"parameters_nonfinite/{name}", nonfinite


class Histograms(GradientHistograms):
    """Histograms of gradients (log10 of magnitude) and of parameters (linear), exact counts."""

    def parts(self) -> tuple[Probe, ...]:
        """One probe for each source."""
        return (GradientHistograms(self.every, select=self.select), ParameterHistograms(self.every, select=self.select))
