"""Which probes sample which step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, TypeAlias

from torchprobe.capture.gate import Gate, Meter
from torchprobe.probes.activations import Activations
from torchprobe.probes.attention import Attention
from torchprobe.probes.base import Probe
from torchprobe.probes.calibration import Calibration
from torchprobe.probes.gradients import Gradients
from torchprobe.probes.histograms import Histograms
from torchprobe.probes.learning_rates import LearningRates
from torchprobe.probes.loss import Loss
from torchprobe.probes.parameters import Parameters, Updates
from torchprobe.probes.provenance import Provenance
from torchprobe.probes.uncertainty import Uncertainty
from torchprobe.probes.unit_activity import UnitActivity
from torchprobe.schedule import Schedule, as_schedule

AnyProbe: TypeAlias = "Probe | LearningRates"


def default_probes() -> list[AnyProbe]:
    """What `instrument` watches when no probes are named."""
    watched: list[AnyProbe] = [Gradients(), Parameters(), Updates(), Activations(), Attention()]
    watched += [Uncertainty(), Calibration(), Histograms(), LearningRates(), Loss()]
    return [*watched, UnitActivity(), Provenance()]


def checked_probes(probes: Iterable[AnyProbe] | None) -> list[AnyProbe]:
    """The probes of an `instrument` call, each for one source. Raises TypeError for anything else."""
    if probes is None:
        probes = default_probes()
    if isinstance(probes, str | Probe) or not isinstance(probes, Iterable):
        raise TypeError(f"probes={probes!r}: takes a list of probes, such as [torchprobe.Gradients(every=10)]")
    parts: list[AnyProbe] = []
    for probe in probes:
        if isinstance(probe, type):
            raise TypeError(f"probes: got the class {probe.__name__}; write {probe.__name__}() with the brackets")
        if not isinstance(probe, Probe | LearningRates):
            raise TypeError(f"probes: got {probe!r}; takes probe objects, such as torchprobe.Gradients(every=10)")
        parts += probe.parts() if isinstance(probe, Probe) else [probe]
    return parts


def with_provenance(probes: list[AnyProbe]) -> list[AnyProbe]:
    """The same with a `Provenance` that no schedule samples, for when NaN is seen, unless there is one already."""
    there = any(isinstance(probe, Provenance) for probe in probes)
    return probes if there else [*probes, Provenance(every=lambda step: False)]


class Plan:
    """The gates of all probes, opened and closed between steps by their schedules.

    every: the cadence of each probe that names none of its own. budget: the largest fraction of wall
    time to spend; while more than that is spent, no step is sampled.
    """

    def __init__(
        self, probes: Sequence[AnyProbe], every: int | Schedule | None, budget: float | None, meter: Meter
    ) -> None:
        common = None if every is None else as_schedule("every", every)
        self.gates: dict[Probe, Gate] = {probe: Gate(probe.name, meter) for probe in probes if isinstance(probe, Probe)}
        chosen = {p: common if common is not None and p.every is None else p.schedule for p in self.gates}
        self._cadences = _by_schedule(chosen)
        self.rates = [probe for probe in probes if isinstance(probe, LearningRates)]
        self.descriptions = {group: text for probe in probes for group, text in probe.descriptions.items()}
        self.loss_probes = [probe for probe in self.gates if isinstance(probe, Loss)]
        self.loss_gate = next((self.gates[probe] for probe in self.loss_probes), Gate("Loss", meter))
        self._budget = budget
        self._meter = meter
        self._start = monotonic()
        self._awaits_validation = dict.fromkeys(self.gates)
        self._in_validation = frozenset(filter(_in_validation, self.gates))
        self._in_all_of_validation = frozenset(filter(_in_all_of_validation, self.gates))
        self._validating = False  # a pass was sampled since training last went on
        self.due: tuple[Probe, ...] = ()
        self.due_in_validation: tuple[Probe, ...] = ()

    @property
    def over_ranks(self) -> list[Any]:
        """Whose rows several ranks combine: the probes, and what reports beside one."""
        return [*self.gates, *(probe.coverage for probe in self.gates if isinstance(probe, Calibration))]

    def open_for(self, step: int, by_forward: bool = False) -> None:
        """Set the gates for a coming training step, and for a validation pass before it.

        A validation pass is sampled when a training step was, since the last one. by_forward: forward
        passes are the clock, so that each is a step of its own.
        """
        self._awaits_validation.update(dict.fromkeys(self.due))
        scheduled = self._scheduled(step)
        due, in_validation = [], []
        for probe, gate in self.gates.items():
            gate.train = probe in scheduled and not gate.failed
            awaited = gate.train if by_forward else probe in self._awaits_validation and not gate.failed
            gate.val = awaited and probe in self._in_validation
            if gate.train:
                due.append(probe)
            if gate.val:
                in_validation.append(probe)
        self.due, self.due_in_validation = tuple(due), tuple(in_validation)

    def validated(self) -> None:
        """A batch of validation was sampled: most probes want no more until the next sampled step."""
        self._validating = True
        self._close_validation([probe for probe in self.gates if probe not in self._in_all_of_validation])

    def validation_ended(self) -> None:
        """Training goes on: validation is sampled again after the next sampled step."""
        if self._validating:
            self._validating = False
            self._close_validation(list(self.gates))

    def _close_validation(self, done: Sequence[Probe]) -> None:
        for probe in done:
            self._awaits_validation.pop(probe, None)
            self.gates[probe].val = False
        self.due_in_validation = tuple(probe for probe in self.due_in_validation if probe not in done)

    def state_dict(self) -> dict[str, Any]:
        """What the cadence cannot tell from a step's number: which probes await a validation pass."""
        return {"awaits_validation": sorted(probe.name for probe in self._awaits_validation)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        awaiting = set(state["awaits_validation"])
        self.due = ()
        self._awaits_validation = dict.fromkeys(probe for probe in self.gates if probe.name in awaiting)

    def _scheduled(self, step: int) -> set[Probe]:
        scheduled: set[Probe] = set()
        if step == 1 or not self._over_budget():
            for schedule, probes in self._cadences:
                if schedule(step):
                    scheduled.update(probes)
        return scheduled

    def _over_budget(self) -> bool:
        if self._budget is None:
            return False
        return self._meter.seconds > self._budget * (monotonic() - self._start)


def _by_schedule(schedules: Mapping[Probe, Schedule]) -> list[tuple[Schedule, list[Probe]]]:
    """Probes that share a schedule, so that it is asked once; a user's need not be hashable."""
    groups: list[tuple[Schedule, list[Probe]]] = []
    for probe, schedule in schedules.items():
        probes = next((probes for other, probes in groups if other is schedule or other == schedule), None)
        if probes is None:
            groups.append((schedule, [probe]))
        else:
            probes.append(probe)
    return groups


def _in_validation(probe: Probe) -> bool:
    if isinstance(probe, Attention):
        return probe.eval
    return probe.source == "outputs" or _in_all_of_validation(probe)


def _in_all_of_validation(probe: Probe) -> bool:
    """Whether a probe watches every batch of a validation pass."""
    return isinstance(probe, Uncertainty | Calibration)
