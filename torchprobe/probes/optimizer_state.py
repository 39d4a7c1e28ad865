"""What optimizers remember of past gradients, and how far they move each element."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.naming import owner_of
from torchprobe.probes.base import Probe, Report
from torchprobe.statistics import norms

DESCRIPTION = (
    "momentum_norm: L2 norm of the optimizer's momentum of the module's own parameters (exp_avg, momentum_buffer). "
    "second_moment_rms: root mean square of its second moment (exp_avg_sq, square_avg). step_rms: root mean square of "
    "the step just taken. Exact, over finite elements."
)

_TAGS: Mapping[str, tuple[str, Callable[[float, float], float]]] = {
    "momenta": ("momentum_norm", lambda squares, count: math.sqrt(squares)),
    "second_moments": ("second_moment_rms", lambda squares, count: math.sqrt(squares / count)),
}


class OptimizerState(Probe):
    """`optimizer/momentum_norm/` and `optimizer/second_moment_rms/<module>`: the state kept for its own parameters.

    The momentum is `exp_avg` (Adam and its kin) or `momentum_buffer` (SGD, RMSprop, Muon); the second moment is
    `exp_avg_sq` (not its maximum, which `amsgrad` keeps beside it) or `square_avg` (RMSprop, Adadelta), as they are
    after the step, without bias correction. What other optimizers keep under other names is left out, and said once:
    `session.summary()` has it. Of sharded parameters it is the state of all shards. `Updates` writes
    `optimizer/step_rms/<module>`. Costs about as much as two norms of all parameters.
    """

    source: ClassVar[tuple[str, ...]] = ("momenta", "second_moments")
    fields: ClassVar[tuple[str, ...]] = norms.SUMS
    reduce = "sum"
    found_everywhere: ClassVar[bool] = False
    descriptions: Mapping[str, str] = {"optimizer": DESCRIPTION}

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """The squares of each tensor's finite elements, and how many there are."""
        return norms.sums_of_squares(tensors)

    def report_sources(self, values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Report:
        """By module, of its own parameters."""
        sums: defaultdict[tuple[str, str], NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(self.fields)))
        for name, by_source in values.items():
            for source, row in by_source.items():
                sums[source, owner_of(name)] += np.array([*row.values()])
        for (source, module), (squares, count, elements) in sums.items():
            tag, of = _TAGS[source]
            if elements:
                yield f"optimizer/{tag}/{module}", of(squares, count) if count else math.nan
