"""Which units behind a ReLU are ever active."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from torchprobe.probes.base import Probe, Way
from torchprobe.records import Value


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
