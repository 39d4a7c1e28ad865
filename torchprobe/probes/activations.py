"""Activations: the distribution of what each module puts out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.probes.base import Probe, Report
from torchprobe.probes.checks import Select
from torchprobe.probes.schedule import Schedule
from torchprobe.statistics import energy, moments


class Activations(Probe):
    """Mean, std, rms, largest magnitude and zero fraction of module outputs, over finite elements.

    A module that runs several times in a step is one entry with merged statistics. Exact.
    gradients: also the norm of the gradient with respect to each output (`ActivationGradients`).
    """

    source: ClassVar[str] = "outputs"
    fields: ClassVar[tuple[str, ...]] = moments.FIELDS
    descriptions: Mapping[str, str] = {
        "activation_mean": "Mean of the module's output (exact, finite elements).",
        "activation_std": "Population standard deviation of the module's output (exact, finite elements).",
        "activation_rms": "Root mean square of the module's output (exact, finite elements).",
        "activation_max_abs": "Largest magnitude in the module's output (exact, finite elements).",
        "activation_zero_fraction": "Fraction of the module's output that is exactly zero (exact).",
        "activation_nonfinite": "Number of NaN and inf elements in the module's output; only when not 0.",
    }

    def __init__(
        self, every: int | Schedule | None = None, *, gradients: bool = True, select: Select | None = None
    ) -> None:
        super().__init__(every, select=select)
        self._gradients = gradients

    def parts(self) -> tuple[Probe, ...]:
        """The outputs, and their gradients unless switched off."""
        return (self, ActivationGradients(self.every, select=self.select)) if self._gradients else (self,)

    def compute(self, tensor: Tensor) -> Tensor:
        """One pass of `statistics.moments`."""
        return moments.compute(tensor)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Chan's parallel merge."""
        return moments.combine(a, b)

    def combine_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same, all modules at once."""
        return moments.combine(torch.from_numpy(a), torch.from_numpy(b)).numpy()

    def report(self, name: str, values: Mapping[str, float]) -> Report:
        """One tag per summary value; the non-finite count only when there is one."""
        for key, value in moments.summarise(list(values.values())).items():
            if key != "nonfinite" or value:
                yield f"activation_{key}/{name}", value


class ActivationGradients(Probe):
    """L2 norm of the loss's gradient with respect to each module's output, over finite elements."""

    source: ClassVar[str] = "output_gradients"
    fields: ClassVar[tuple[str, ...]] = energy.FIELDS
    descriptions: Mapping[str, str] = {
        "activation_grad_norm": "L2 norm of the gradient with respect to the module's output (exact).",
        "activation_grad_nonfinite": "Number of NaN and inf elements in that gradient; only when not 0.",
    }

    def compute(self, tensor: Tensor) -> Tensor:
        """The sum of squares."""
        return energy.compute(tensor)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum over two parts together."""
        return energy.combine(a, b)

    def combine_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same, all modules at once."""
        return energy.combine(torch.from_numpy(a), torch.from_numpy(b)).numpy()

    def unscale(self, rows: Tensor, scale: Tensor) -> Tensor:
        """The sum of squares scales with the square."""
        one = torch.ones_like(scale)
        return rows * torch.stack([scale.square().reciprocal(), one, one])

    def report(self, name: str, values: Mapping[str, float]) -> Report:
        """The norm, and the non-finite count when there is one."""
        yield f"activation_grad_norm/{name}", math.sqrt(values["sum_squares"])
        if values["nonfinite"]:
            yield f"activation_grad_nonfinite/{name}", values["nonfinite"]
