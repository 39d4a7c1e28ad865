"""Gradients: the ones that the optimizer is about to use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.naming import owner_of
from torchprobe.probes.base import Probe
from torchprobe.records import Value
from torchprobe.statistics import norms


class Gradients(Probe):
    """L2 norms by parameter and module, mean magnitude by module, non-finite counts, the total.

    After accumulation, unscaling, the all-reduce and clipping. Exact, over finite elements.
    """

    source: ClassVar[str] = "gradients"
    fields: ClassVar[tuple[str, ...]] = norms.FIELDS
    reduce = "sum"
    descriptions: Mapping[str, str] = {
        "grad_norm": "L2 norm of the gradient that the optimizer is about to use (exact, finite elements).",
        "grad_norm_layer": "L2 norm of the gradients of the module's own parameters (exact).",
        "grad_mean_abs": "Mean of absolute gradient over the module's own parameters (exact).",
        "grad_nonfinite": "Number of NaN and inf gradient elements; written only when not 0.",
        "overview": "What to look at first.",
    }

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """Finite sums of every gradient."""
        return norms.finite_sums(tensors)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Per parameter, per owning module, and the total."""
        latest = dict(zip(names, rows, strict=True))  # a parameter that was stepped twice counts once
        layers: defaultdict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(self.fields)))
        for name, row in latest.items():
            yield f"grad_norm/{name}", norms.l2_norm(row.tolist())
            layers[owner_of(name)] += row
        for layer, row in layers.items():
            _, magnitude, nonfinite, count = row
            yield f"grad_norm_layer/{layer}", norms.l2_norm(row.tolist())
            if count:
                yield f"grad_mean_abs/{layer}", magnitude / count
            if nonfinite:
                yield f"grad_nonfinite/{layer}", float(nonfinite)
        yield "overview/grad_norm", norms.l2_norm(np.sum(list(latest.values()), axis=0).tolist())
