"""Gradients that an optimizer uses, what it keeps of past ones, how large parameters are, how far a step moves them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import add
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.naming import owner_of
from torchprobe.probes.base import Probe, Report, Reporter
from torchprobe.probes.clipping import ChangesReporter
from torchprobe.records import Value
from torchprobe.statistics import norms

_OPTIMIZER = (
    "momentum_norm: L2 norm of the optimizer's momentum of the module's own parameters (exp_avg, momentum_buffer). "
    "second_moment_rms: root mean square of its second moment (exp_avg_sq, square_avg). step_rms: root mean square of "
    "the step just taken. Exact, over finite elements."
)

_OF_STATE: Mapping[str, tuple[str, Callable[[float, float], float]]] = {
    "momenta": ("momentum_norm", lambda squares, count: math.sqrt(squares)),
    "second_moments": ("second_moment_rms", lambda squares, count: math.sqrt(squares / count)),
}


class Gradients(Probe):
    """L2 norms by parameter and module, mean magnitude by module, non-finite counts, the total.

    After accumulation, unscaling, the all-reduce and clipping. Exact, over finite elements. The total before clipping,
    `overview/grad_norm_unclipped`, costs two passes over the gradients more, and two for each further micro-batch.
    """

    source: ClassVar[str] = "gradients"
    fields: ClassVar[tuple[str, ...]] = norms.FIELDS
    columns: ClassVar[tuple[int, ...]] = (7, 8, 5, 0)
    reduce = "sum"
    descriptions: Mapping[str, str] = {
        "grad_norm": "L2 norm of the gradient that the optimizer is about to use (exact, finite elements).",
        "grad_norm_layer": "L2 norm of the gradients of the module's own parameters (exact).",
        "grad_mean_abs": "Mean of absolute gradient over the module's own parameters (exact).",
        "grad_nonfinite": "Number of NaN and inf gradient elements; written only when not 0.",
        "overview": "What to look at first.",
    }

    def reporter(self) -> Reporter:
        """With one beside it for what was done to the gradients, which reads the sums of `compute_all`."""
        return GradientsReporter(self) if type(self).compute_all is Gradients.compute_all else Reporter(self)

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """Finite sums of every gradient."""
        return norms.finite_sums(tensors)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Per parameter, per owning module, and the total."""
        latest = dict(zip(names, rows.tolist(), strict=True))  # a parameter that was stepped twice counts once
        layers: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * len(self.fields))
        for name, row in latest.items():
            yield f"grad_norm/{name}", norms.l2_norm(row)
            owner = owner_of(name)
            layers[owner] = [*map(add, layers[owner], row)]
        for layer, row in layers.items():
            _, magnitude, nonfinite, count = row
            yield f"grad_norm_layer/{layer}", norms.l2_norm(row)
            if count:
                yield f"grad_mean_abs/{layer}", magnitude / count
            if nonfinite:
                yield f"grad_nonfinite/{layer}", nonfinite
        yield "overview/grad_norm", norms.l2_norm(np.sum(list(latest.values()), axis=0).tolist())


class GradientsReporter(Reporter):
    """Gradients in one session, and beside them what became of those that the backward pass left."""

    def __init__(self, probe: Gradients) -> None:
        super().__init__(probe)
        self._changes = ChangesReporter(probe)
        self.beside, self.remarks = (self._changes,), self._changes.remarks


class _Norms(Probe):
    """Rows of L2 norms."""

    combines_many: ClassVar[bool] = True

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The norms of two parts together; one of which nothing is finite, whose norm is NaN, counts for nothing."""
        return torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.hypot(a, b)))


class Parameters(_Norms):
    """L2 norm of every parameter after the step, and of all together. Exact, over finite elements."""

    source: ClassVar[str] = "parameters"
    fields: ClassVar[tuple[str, ...]] = ("norm",)
    descriptions: Mapping[str, str] = {
        "param_norm": "L2 norm of the parameter after the step (exact, finite elements)."
    }

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """One norm each."""
        return norms.l2_norms(tensors).unsqueeze(1)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Per parameter, and the total."""
        latest = dict(zip(names, rows[:, 0].tolist(), strict=True))  # a parameter stepped twice counts once
        for name, norm in latest.items():
            yield f"param_norm/{name}", norm
        known = [norm for norm in latest.values() if not math.isnan(norm)]
        yield "overview/param_norm", math.hypot(*known) if known else math.nan


class Updates(_Norms):
    """Update ratio: L2 norm of the step just taken over that of the parameter before it.

    Healthy is about 1e-3 (Karpathy's rule of thumb). A parameter that was all zeros has no ratio. Also
    `optimizer/step_rms/<module>`, the root mean square of the step of the module's own parameters.
    Cost: a copy of the parameters for the duration of the optimizer's step, on sampled steps; in host memory it stays
    where the next step is sampled too.
    """

    source: ClassVar[str] = "updates"
    fields: ClassVar[tuple[str, ...]] = ("update", "before", "root_count")
    descriptions: Mapping[str, str] = {
        "update_ratio": "Norm of the step just taken over the parameter's norm before it; healthy: 1e-3.",
        "optimizer": _OPTIMIZER,
    }

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """Norms of (after - before) and of before, and the root of the number of elements."""
        return norms.distances(tensors, before)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Per parameter, the median, and by module."""
        latest = dict(zip(names, rows.tolist(), strict=True))
        ratios = {name: update / before for name, (update, before, _) in latest.items() if before > 0}
        for name, ratio in ratios.items():
            yield f"update_ratio/{name}", ratio
        known = [ratio for ratio in ratios.values() if not math.isnan(ratio)]
        if ratios:
            yield "overview/update_ratio", float(np.median(known)) if known else math.nan
        layers: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for name, (update, _, root) in latest.items():
            layers[owner_of(name)].append((0.0 if math.isnan(update) else update, root))
        for layer, parts in layers.items():
            update, root = (math.hypot(*column) for column in zip(*parts, strict=True))
            yield f"optimizer/step_rms/{layer}", update / root if root else math.nan


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
    descriptions: Mapping[str, str] = {"optimizer": _OPTIMIZER}

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """The squares of each tensor's finite elements, and how many there are."""
        return norms.sums_of_squares(tensors)

    def report_sources(self, values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Report:
        """By module, of its own parameters."""
        sums: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(self.fields))
        for name, by_source in values.items():
            owner = owner_of(name)
            for source, row in by_source.items():
                sums[source, owner] = [*map(add, sums[source, owner], row.values())]
        for (source, module), (squares, count, elements) in sums.items():
            tag, of = _OF_STATE[source]
            if elements:
                yield f"optimizer/{tag}/{module}", of(squares, count) if count else math.nan
