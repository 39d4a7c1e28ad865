"""The training loss, found by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from torchprobe.probes.base import Probe, Way
from torchprobe.records import Value


class Loss(Probe):
    """`overview/loss`, at every step: the scalar whose gradient the optimizer used.

    The sum of all that `backward()` was called on since the optimizer's gradients were last zeroed, counting what
    reached its parameters, without GradScaler's scale; mean over ranks. Costs a copy of one number.
    """

    source: ClassVar[str] = "loss"
    fields: ClassVar[tuple[str, ...]] = ("loss",)
    reduce = "last"  # rows are listed side by side, and never merged
    default_every: ClassVar[int] = 1
    sampled: ClassVar[bool] = False
    always: ClassVar[bool] = True
    over_batches: ClassVar[Way] = "append"
    over_shards: ClassVar[Way] = "append"
    descriptions: Mapping[str, str] = {"overview": "What to look at first."}

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """One value a step: the mean, when two optimizers or several ranks had a loss each."""
        yield "overview/loss", float(rows[:, 0].mean())
