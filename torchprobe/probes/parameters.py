"""Parameters: how large they are, and how far a step moves them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.probes.base import Probe
from torchprobe.records import Value
from torchprobe.statistics import norms


class Parameters(Probe):
    """L2 norm of every parameter after the step, and of all together. Exact, over finite elements."""

    source: ClassVar[str] = "parameters"
    fields: ClassVar[tuple[str, ...]] = ("norm",)
    descriptions: Mapping[str, str] = {
        "param_norm": "L2 norm of the parameter after the step (exact, finite elements)."
    }

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """One norm each."""
        return norms.l2_norms(tensors).unsqueeze(1)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The norm of two parts together."""
        return _together(a, b)

    def combine_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same, all parameters at once."""
        return _together(torch.from_numpy(a), torch.from_numpy(b)).numpy()

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Per parameter, and the total."""
        latest = dict(zip(names, rows[:, 0].tolist(), strict=True))  # a parameter stepped twice counts once
        for name, norm in latest.items():
            yield f"param_norm/{name}", norm
        known = [norm for norm in latest.values() if not math.isnan(norm)]
        yield "overview/param_norm", math.hypot(*known) if known else math.nan


class Updates(Probe):
    """Update ratio: L2 norm of the step just taken over that of the parameter before it.

    Healthy is about 1e-3 (Karpathy's rule of thumb). A parameter that was all zeros has no ratio.
    Cost: a copy of the parameters for the duration of the optimizer's step, on sampled steps; in host memory it stays
    where the next step is sampled too.
    """

    source: ClassVar[str] = "updates"
    fields: ClassVar[tuple[str, ...]] = ("update", "before")
    descriptions: Mapping[str, str] = {
        "update_ratio": "Norm of the step just taken over the parameter's norm before it; healthy: 1e-3."
    }

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """Norms of (after - before) and of before."""
        return norms.distances(tensors, before)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The norms of two parts together."""
        return _together(a, b)

    def combine_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same, all parameters at once."""
        return _together(torch.from_numpy(a), torch.from_numpy(b)).numpy()

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Per parameter, and the median."""
        pairs = zip(names, rows.tolist(), strict=True)
        ratios = {name: update / before for name, (update, before) in pairs if before > 0}
        for name, ratio in ratios.items():
            yield f"update_ratio/{name}", ratio
        known = [ratio for ratio in ratios.values() if not math.isnan(ratio)]
        if ratios:
            yield "overview/update_ratio", float(np.median(known)) if known else math.nan


def _together(a: Tensor, b: Tensor) -> Tensor:
    """The norms of two parts together; one of which nothing is finite, whose norm is NaN, counts for nothing."""
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.hypot(a, b)))
