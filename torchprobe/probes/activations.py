"""Activations: the distribution of what each module puts out, its gradient, and which units are ever active."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.probes.base import Probe, Report, Way
from torchprobe.probes.checks import Select
from torchprobe.probes.schedule import Schedule
from torchprobe.records import Value
from torchprobe.statistics import moments, norms


class Activations(Probe):
    """Mean, std, rms, kurtosis, largest magnitude and zero fraction of module outputs, over finite elements.

    A module that runs several times in a step is one entry with merged statistics. Exact.
    gradients: also the norm of the gradient with respect to each output (`ActivationGradients`).
    """

    source: ClassVar[str] = "outputs"
    fields: ClassVar[tuple[str, ...]] = moments.FIELDS
    columns: ClassVar[tuple[int, ...]] = tuple(range(len(moments.FIELDS)))
    combines_many: ClassVar[bool] = True
    descriptions: Mapping[str, str] = {
        "activation_mean": "Mean of the module's output (exact, finite elements).",
        "activation_std": "Population standard deviation of the module's output (exact, finite elements).",
        "activation_rms": "Root mean square of the module's output (exact, finite elements).",
        "activation_max_abs": "Largest magnitude in the module's output (exact, finite elements).",
        "activation_zero_fraction": "Fraction of the module's output that is exactly zero (exact).",
        "activation_kurtosis": "Fourth moment about 0 over the squared second one, minus 3, of the module's output "
        "(exact, finite elements): 0 for a normal distribution around 0, large for massive activations.",
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
        """Chan's parallel merge, and fourth powers on one scale."""
        return moments.combine(a, b)

    def report(self, name: str, values: Mapping[str, float]) -> Report:
        """One tag per summary value; the non-finite count only when there is one."""
        for key, value in moments.summarise(list(values.values())).items():
            if key != "nonfinite" or value:
                yield f"activation_{key}/{name}", value


class ActivationGradients(Probe):
    """L2 norm of the loss's gradient with respect to each module's output, over finite elements."""

    source: ClassVar[str] = "output_gradients"
    fields: ClassVar[tuple[str, ...]] = norms.SQUARES
    degrees: ClassVar[tuple[float, ...]] = (2, 0)
    columns: ClassVar[tuple[int, ...]] = (11, 12)
    combines_many: ClassVar[bool] = True
    descriptions: Mapping[str, str] = {
        "activation_grad_norm": "L2 norm of the gradient with respect to the module's output (exact).",
        "activation_grad_nonfinite": "Number of NaN and inf elements in that gradient; only when not 0.",
    }

    def compute(self, tensor: Tensor) -> Tensor:
        """The sum of squares."""
        return norms.sum_squares(tensor)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum over two parts together."""
        return norms.combine_squares(a, b)

    def report(self, name: str, values: Mapping[str, float]) -> Report:
        """The norm, and the non-finite count when there is one."""
        yield f"activation_grad_norm/{name}", math.sqrt(values["sum_squares"])
        if values["nonfinite"]:
            yield f"activation_grad_nonfinite/{name}", values["nonfinite"]


class UnitActivity(Probe):
    """`dead_units/<module>`: share of a ReLU's units that are active on under 1 % of inputs.

    Of the modules `nn.ReLU`, `nn.ReLU6` and `nn.Threshold`, in eager training passes; `torch.relu` has no module to
    watch, and what leaks below zero (LeakyReLU, GELU, SiLU, ELU) passes a gradient there and is not dead. A unit is a
    channel of a (N, C, …) image with two or more spatial dimensions, else an element of the last dimension; its inputs
    are all examples and positions. Under 32 inputs say little: they are gathered over sampled steps until there are as
    many. Of several ranks it is the mean share, each over its own inputs.
    """

    source: ClassVar[str] = "units"
    found_everywhere: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = ("dead",)
    reduce = "last"  # rows are listed side by side, and never merged
    over_batches: ClassVar[Way] = "append"
    over_shards: ClassVar[Way] = "append"
    descriptions: Mapping[str, str] = {
        "dead_units": "Share of the ReLU's units that are active on under 1 % of inputs (exact)."
    }

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """One tag a module; names repeat where several ranks have a share each."""
        shares: defaultdict[str, list[float]] = defaultdict(list)
        for name, share in zip(names, rows[:, 0].tolist(), strict=True):
            if not math.isnan(share):
                shares[name].append(share)
        for name, known in shares.items():
            yield f"dead_units/{name}", math.fsum(known) / len(known)
