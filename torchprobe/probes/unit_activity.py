"""Which units behind a ReLU are ever active."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torchprobe.probes.base import Probe, Report, Source


class UnitActivity(Probe):
    """`dead_units/<module>`: share of a ReLU's units that are active on under 1 % of inputs.

    Of the modules `nn.ReLU`, `nn.ReLU6` and `nn.Threshold`, in eager training passes; `torch.relu` has no module to
    watch, and what leaks below zero (LeakyReLU, GELU, SiLU, ELU) passes a gradient there and is not dead. A unit is a
    channel of a (N, C, …) image with two or more spatial dimensions, else an element of the last dimension; its inputs
    are all examples and positions. Under 32 inputs say little: they are gathered over sampled steps until there are as
    many.
    """

    source: ClassVar[Source] = "units"
    found_everywhere: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = ("dead",)
    descriptions: Mapping[str, str] = {
        "dead_units": "Share of the ReLU's units that are active on under 1 % of inputs (exact)."
    }
    reason: str

    def report(self, name: str, values: Mapping[str, float]) -> Report:
        """One tag a module."""
        if not math.isnan(values["dead"]):
            yield f"dead_units/{name}", values["dead"]
