"""The uncertainty and calibration probes on a model: what passes gave, as rows for the buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.predictions.capture import PredictionCapture
from torchprobe.capture.predictions.phase import Moment, Phase
from torchprobe.capture.predictions.plain_outputs import Settled
from torchprobe.probes.base import Probe
from torchprobe.probes.calibration import FLAGS, UNJUDGED, Calibration
from torchprobe.probes.evidence import EVIDENCE
from torchprobe.probes.uncertainty import Uncertainty
from torchprobe.statistics import calibration

_SAMPLES_A_PICTURE = 10  # sampled steps


class PredictionSource:
    """What the uncertainty and calibration probes read; they share it.

    The rows of a training pass belong to that pass: `take` gives them at its end, `rows_of` turns those of the passes
    that count into pieces. Those of a validation are collected when it is over.
    """

    def __init__(
        self, model: ReferenceType[nn.Module], gates: Mapping[Probe, Gate], meter: Meter, flush_every: int
    ) -> None:
        self._gates = {p: gate for p, gate in gates.items() if isinstance(p, Uncertainty | Calibration)}
        self._reporting = _Reporting(list(self._gates))
        self._shared = Gate("Uncertainty and Calibration", meter)
        options = next((p for p in self._gates if isinstance(p, Uncertainty)), Uncertainty())
        self._capture = PredictionCapture(model, options, self._shared, Settled(self._reporting.recognised))
        self._flush_every = flush_every
        self._step, self._sampled = 0, 0
        self._pictures_due = False
        self._following = False  # the pass that runs, or has just returned, is read
        self._given: list[Phase] = []  # of training passes, until they are taken
        self.on_recomputed = self._capture.on_recomputed
        self.explain = self._reporting.explain

    def open_for(self, step: int) -> None:
        """A step begins."""
        self._step = step
        self._pictures_due = self._sampled % _SAMPLES_A_PICTURE == 0
        self._sampled += self.is_open(training=True)

    def is_open(self, training: bool) -> bool:
        """Whether a pass is sampled."""
        return not self._shared.failed and bool(self._due(training))

    def enter(self, due: bool, training: bool) -> None:
        """A pass begins; due: whether any probe samples it."""
        if self._following:
            self._capture.end_pass()
        self._following = due and self.is_open(training)
        if self._following:
            self._capture.enter(training, self._moment(training))

    def leave(self) -> None:
        """A pass has ended, before `on_output`, or raised."""
        if self._following:
            self._capture.leave()

    def on_output(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """A pass has returned."""
        if self._following:
            phase = self._capture.on_output(module, args, kwargs, output)
            if phase is not None and phase.training and phase not in self._given[-1:]:
                self._given.append(phase)

    def on_backward(self) -> None:
        """Backward runs through an output: nothing to do, gradients find their phase by themselves."""

    def take(self) -> Phase | None:
        """What the training pass gave that has just returned; None if it was not read. A pass over the same input as
        the one before goes on in that one's phase, which is then given again.
        """
        given, self._given = self._given, []
        return given[-1] if given else None

    def merged(self, a: Phase, b: Phase) -> Phase:
        """Two phases as one, whatever is still told to either: for many micro-batches, whose backward has run."""
        with self._shared.boundary(), torch.no_grad():
            if a is not b:
                a.absorb(b)
        return a

    def rows_of(self, phases: Sequence[Phase], training: bool = True) -> list[Piece]:
        """The rows of these phases added up, for the probes that sampled them. What was given once is not given again:
        of a phase that is asked for twice only what came later follows.
        """
        pieces: list[Piece] = []
        if phases and not self._shared.failed:
            with self._shared.boundary(), torch.no_grad():
                total = Phase(training, phases[-1].moment)
                for phase in phases:
                    total.take_from(phase)
                pieces = [piece for probe in total.moment.probes for piece in self._pieces(probe, total)]
        return pieces

    def end_step(self) -> None:
        """A step is over, sampled or not: what the host has learnt of the outputs counts from now on."""
        self._capture.end_step()

    def collect(self, training: bool) -> list[Piece]:
        """Everything since the last call: of a validation, or of all training passes that nobody took."""
        if training:
            given, self._given = self._given, []
            if given:
                self._capture.end_step()
            return self.rows_of(given)
        phase = self._capture.end_validation()
        return [] if phase is None else self.rows_of([phase], training=False)

    def given(self, predictions: Tensor, targets: Tensor, training: bool) -> Piece | None:
        """Predictions that the user handed in."""
        probe, row = self._reporting.calibration, None
        if probe is not None and not self._shared.failed:
            with self._shared.boundary(), torch.no_grad(), torch._C.DisableTorchFunction():
                row = calibration.compute(predictions, targets)
                flags = _flags(row, self._moment(training))
                row = torch.cat((row, row.new_zeros(len(EVIDENCE)), flags))[None]
        if probe is None or row is None:
            return None
        return Piece(probe, [_name("|given", training)], row, _prefix(training))

    def detach(self) -> None:
        """Take everything off."""
        self._capture.detach()
        self._given = []

    def _due(self, training: bool) -> tuple[Probe, ...]:
        return tuple([probe for probe, gate in self._gates.items() if (gate.train if training else gate.val)])

    def _moment(self, training: bool) -> Moment:
        pictures = self._pictures_due or not training
        return Moment(self._step, self._due(training), self._step // self._flush_every, pictures)

    def _pieces(self, probe: Probe, phase: Phase) -> Iterator[Piece]:
        prefix = _prefix(phase.training)
        self._reporting.tell(probe, phase)
        if isinstance(probe, Uncertainty):
            yield from (Piece(probe, names, rows, prefix) for names, rows in phase.uncertainty.rows())
        elif isinstance(probe, Calibration):
            yield from _of_calibration(probe, phase, prefix)
            yield from self._reporting.of_coverage(probe, phase, prefix)


class _Reporting:
    """All that is read of the probes, and told to them."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._uncertainty = next((p for p in probes if isinstance(p, Uncertainty)), None)
        self.calibration = next((p for p in probes if isinstance(p, Calibration)), None)

    def recognised(self) -> str | None:
        """The form of the model's plain output, as far as the drain thread knows."""
        probe = self._uncertainty or self.calibration
        return None if probe is None else probe.evidence.recognised

    def explain(self, reason: str) -> None:
        """Why nothing can be seen at all."""
        for probe in (self._uncertainty, self.calibration):
            if probe is not None:
                probe.reason = reason

    def tell(self, probe: Probe, phase: Phase) -> None:
        """Why these passes say nothing, where that is known, and what else is known of them."""
        if isinstance(probe, Uncertainty):
            probe.reason, probe.note = phase.unread, phase.note
        elif isinstance(probe, Calibration):
            probe.reason = phase.cannot_judge

    def of_coverage(self, probe: Calibration, phase: Phase, prefix: str) -> Iterator[Piece]:
        """How often targets were in their intervals; behind the row the number of the flush interval, and 1."""
        for names, rows in phase.coverage.rows():
            found = rows[:, : -len(EVIDENCE)]
            number, one = found.new_full((len(found), 1), float(phase.moment.window)), found.new_ones(len(found), 1)
            phases = [_phase_name(phase.training)] * len(names)
            yield Piece(probe.coverage, phases, torch.cat((found, number, one), 1), prefix)


def _of_calibration(probe: Calibration, phase: Phase, prefix: str) -> Iterator[Piece]:
    training = phase.training
    for names, rows in phase.calibration.rows():
        flags = _flags(rows, phase.moment).expand(len(rows), -1)
        yield Piece(probe, [_name(name, training) for name in names], torch.cat((rows, flags), 1), prefix)
    if phase.unjudged and not training and not phase.calibration:
        nothing = torch.zeros(1, probe.width, dtype=torch.float64)
        yield Piece(probe, [_name(f"|{UNJUDGED}", training)], nothing, prefix)


def _flags(like: Tensor, moment: Moment) -> Tensor:
    values = {"window": moment.window, "pictures": moment.pictures, "rows": 1}
    return torch.stack([like.new_full((), float(values[flag])) for flag in FLAGS])


def _name(name: str, training: bool) -> str:
    return f"{name}|{_phase_name(training)}"


def _phase_name(training: bool) -> str:
    return "train" if training else "val"


def _prefix(training: bool) -> str:
    return "" if training else "val/"
