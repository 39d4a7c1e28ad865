"""The training loss, found by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from torchprobe.probes.base import Probe, Way
from torchprobe.records import Value


class Loss(Probe):
    """`overview/loss`: at every step when the model returns a `loss`, else on sampled steps. Mean over ranks.

    Mean over the micro-batches of a step. Without a `loss` field it is the value of the loss module that
    ran on the model's output, or what `backward()` was called on, without GradScaler's scale.
    """

    source: ClassVar[str] = "loss"
    fields: ClassVar[tuple[str, ...]] = ("loss",)
    reduce = "mean"
    over_batches: ClassVar[Way] = "append"
    over_shards: ClassVar[Way] = "append"
    descriptions: Mapping[str, str] = {"overview": "What to look at first."}

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """One value a step: the mean, when two optimizers or several ranks had a loss each."""
        yield "overview/loss", float(rows[:, 0].mean())
