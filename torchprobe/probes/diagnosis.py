"""What diagnoses of training bugs are decided by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from torchprobe.probes.base import InValidation, Probe
from torchprobe.records import EVIDENCE, Value


class Diagnosis(Probe):
    """Evidence for the rules of `docs/diagnoses.md`: gives no tags, and alerts only where something is wrong.

    Looks at the optimizer's parameters and gradients, at the graph between the model's output and the loss, at inputs
    and at how modules are called, on sampled steps. Costs a few reductions over outputs and inputs, and norms of small
    gradients; nothing on other steps.
    """

    source: ClassVar[str] = "diagnosis"
    found_everywhere: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = ("value",)
    reduce = "max"
    in_validation: InValidation = "all"  # how many there are in a row tells it from other passes without gradients

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """A number for each name, for rules alone."""
        for name, value in zip(names, rows[:, 0].tolist(), strict=True):
            yield EVIDENCE + name, value
