"""Separation: whether a score tells data of the training distribution from other data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from torchprobe.records import Histogram, Value
from torchprobe.statistics import out_of_distribution as separation


class Separation:
    """Rows of `statistics.separation` as `<name>/auroc` and two histograms, `<name>/in` and `<name>/out`."""

    def __init__(self) -> None:
        self.descriptions: Mapping[str, str] = {}

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """A row a name. What is not finite is counted beside it."""
        for name, row in zip(names, rows, strict=True):
            self.descriptions = {**self.descriptions, name.split("/", 1)[0]: _MEANING}
            for key, value in separation.summarise(row).items():
                if key == "auroc" or (key.startswith("nonfinite") and value):
                    yield f"{name}/{key}", value
            for side, (edges, counts) in separation.histograms(row).items():
                yield f"{name}/{side}", Histogram(edges, counts)


_MEANING = (
    "AUROC: how often a score from outside the distribution is above one from inside, ties by half; 0.5 is chance "
    "(exact). And both sets of scores."
)
