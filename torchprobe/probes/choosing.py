"""Which probes a session has."""

from __future__ import annotations

from collections.abc import Iterable

from torchprobe.probes.activations import Activations, UnitActivity
from torchprobe.probes.attention import Attention
from torchprobe.probes.base import Probe
from torchprobe.probes.calibration import Calibration
from torchprobe.probes.checks import check_merging, check_probe_class, offered_sources
from torchprobe.probes.diagnosis import Diagnosis
from torchprobe.probes.gradients import Gradients, OptimizerState, Parameters, Updates
from torchprobe.probes.histograms import Histograms
from torchprobe.probes.learning_rates import LearningRates
from torchprobe.probes.loss import Loss
from torchprobe.probes.performance import Performance
from torchprobe.probes.provenance import Provenance
from torchprobe.probes.routing import Routing
from torchprobe.probes.schedule import Never
from torchprobe.probes.uncertainty import Uncertainty


def default_probes() -> list[Probe]:
    """What `instrument` watches when no probes are named."""
    watched: list[Probe] = [Gradients(), Parameters(), Updates(), OptimizerState(), Activations()]
    watched += [Attention(), Uncertainty(), Calibration(), Histograms(), LearningRates(), Loss()]
    return [*watched, UnitActivity(), Routing(), Provenance(), Diagnosis(), Performance()]


def checked_probes(probes: Iterable[Probe] | None) -> list[Probe]:
    """The probes of an `instrument` call, those of several parts taken apart.

    Raises TypeError for anything else, and for a probe that does not say how parts of a step are merged.
    """
    if probes is None:
        probes = default_probes()
    if isinstance(probes, str | Probe) or not isinstance(probes, Iterable):
        raise TypeError(f"probes={probes!r}: takes a list of probes, such as [torchprobe.Gradients(every=10)]")
    parts: dict[Probe, None] = {}
    for probe in probes:
        if not isinstance(probe, Probe):
            hint = f"; write {probe.__name__}() with the brackets" if isinstance(probe, type) else ""
            raise TypeError(f"probes: got {probe!r}, takes probe objects such as torchprobe.Gradients(){hint}")
        parts |= dict.fromkeys(probe.parts())
    for part in parts:
        check_probe_class(type(part), offered_sources())
        check_merging(part.name, part.reduce, part.combines)
    return list(parts)


def with_provenance(probes: list[Probe]) -> list[Probe]:
    """The same with a `Provenance` that no schedule samples, for when NaN is seen, unless there is one already."""
    there = any("flow" in probe.sources for probe in probes)
    return probes if there else [*probes, Provenance(every=Never())]
