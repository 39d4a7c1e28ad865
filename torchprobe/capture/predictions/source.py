"""The uncertainty and calibration probes on a model: what passes gave, as rows for the buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import no_torch_function
from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.predictions.capture import PredictionCapture
from torchprobe.capture.predictions.matching import settle
from torchprobe.capture.predictions.phase import Moment, Phase
from torchprobe.capture.predictions.plain_outputs import Settled
from torchprobe.capture.source import Pass
from torchprobe.probes.base import Reporter
from torchprobe.probes.calibration import FLAGS, UNJUDGED, CalibrationReporter
from torchprobe.probes.evidence import EVIDENCE, of_head, of_loop
from torchprobe.probes.uncertainty import Uncertainty, UncertaintyReporter
from torchprobe.statistics import calibration

_SAMPLES_A_PICTURE = 10  # sampled steps
_MANY = 16  # phases of a step that are kept apart


class PredictionSource:
    """What the uncertainty and calibration probes read; they share it.

    The rows of a training pass belong to that pass: `take` gives them at its end, `rows_of` turns those of the passes
    that count into pieces. Those of a validation are collected when it is over.
    """

    def __init__(self, model: ReferenceType[nn.Module], reporters: Sequence[Reporter], meter: Meter) -> None:
        self._reporters = [r for r in reporters if r.source in ("uncertainty", "calibration")]
        self._reporting = _Reporting(self._reporters)
        self._shared = Gate("Uncertainty and Calibration", meter)
        options = self._reporting.options
        self._capture = PredictionCapture(model, options, self._shared, Settled(self._reporting.recognised))
        self._step, self._sampled = 0, 0
        self._pictures_due = False
        self._following = False  # the pass that runs, or has just returned, is read
        self._given: list[Phase] = []  # of training passes, until they are taken
        self._settled: list[Phase] = []  # of passes with a graph that were validation: others may go on in the last
        self.on_recomputed = self._capture.on_recomputed
        self.explain = self._reporting.explain

    def open(self, step: int, due: frozenset[Reporter]) -> None:
        """A step is about to begin."""
        self._step = step
        self._pictures_due = self._sampled % _SAMPLES_A_PICTURE == 0
        self._sampled += any([r in due and r.is_regular(step) for r in self._reporters])  # noqa: C419 - costs a call

    def enter(self, passing: Pass) -> None:
        """A pass begins."""
        if self._following:
            self._capture.end_pass()
        due = [] if self._shared.failed else [r for r in self._reporters if r in passing.due and not r.gate.failed]
        self._following = bool(due)
        if due:
            self._capture.enter(passing.training, self._moment(passing.training, due))

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

    def take(self) -> Phase | None:
        """What the training pass gave that has just returned; None if it was not read. A pass over the same input as
        the one before goes on in that one's phase, which is then given again.
        """
        given, self._given = self._given, []
        return given[-1] if given else None

    def merge(self, a: list[Phase], b: list[Phase]) -> list[Phase]:
        """What two passes gave. Of many passes all but the last are one phase, whatever is still told to either."""
        a += [phase for phase in b if phase not in a]
        if len(a) > _MANY:
            with self._shared.boundary(), torch.no_grad():
                for phase in a[1:-1]:
                    a[0].absorb(phase)
            a = [a[0], a[-1]]
        return a

    def rows(self, phases: Sequence[Phase], training: bool, due: frozenset[Reporter]) -> list[Piece]:
        """The rows of these phases added up, for the probes that sampled them; of validation when it is over. What was
        given once is not given again: of a phase that is asked for twice only what came later follows.
        """
        if training:
            return self._rows(phases, True)
        with self._shared.boundary(), torch.no_grad():
            for phase in (output for one in phases for output in one.all_outputs()):
                settle(phase)
        self._settled = self.merge(self._settled, list(phases))
        return []

    def _rows(self, phases: Sequence[Phase], training: bool, loop: str = "") -> list[Piece]:
        pieces: list[Piece] = []
        if phases and not self._shared.failed:
            with self._shared.boundary(), torch.no_grad():
                total = Phase(training, phases[-1].moment)
                for phase in phases:
                    total.take_from(phase)
                for kind in ("passes", "loss"):
                    self._reporting.remark(total.lines.get(kind, ""))
                for reporter in total.moment.reporters:
                    pieces += self._pieces(reporter, total, loop)
        return pieces

    def end_step(self) -> None:
        """A step is over, sampled or not: what the host has learnt of the outputs counts from now on."""
        self._capture.end_step()

    def end_validation(self) -> list[Piece]:
        """What the validation passes since the last call add up to."""
        settled, self._settled = self._settled, []
        phases, line = self._capture.end_validation(bool(settled))
        self._reporting.remark(line)
        if len(phases) < 2:
            return self._rows([*settled, *phases], False)
        loops = (self._rows([phase], False, f"loop_{i}") for i, phase in enumerate(phases, 1))
        return [*self._rows(settled, False), *(piece for pieces in loops for piece in pieces)]

    def given(self, predictions: Tensor, targets: Tensor, training: bool) -> list[Piece]:
        """Predictions that the user handed in."""
        reporter, row = self._reporting.calibration, None
        if reporter is not None and not self._shared.failed:
            with self._shared.boundary(), torch.no_grad(), no_torch_function():
                row = calibration.handed_in(predictions, targets)
                flags = _flags(row, self._moment(training, []))
                row = torch.cat((row, row.new_zeros(len(EVIDENCE)), flags))[None]
        if reporter is None or row is None:
            return []
        names = [_name("|given", training)]
        return [Piece(reporter, names, row, _prefix(training)), _of_gap(reporter, names, row)]

    def detach(self) -> None:
        """Take everything off."""
        self._capture.detach()
        self._given, self._settled = [], []

    def _moment(self, training: bool, due: Sequence[Reporter]) -> Moment:
        return Moment(self._step, tuple(due), self._pictures_due or not training)

    def _pieces(self, reporter: Reporter, phase: Phase, loop: str) -> Iterator[Piece]:
        prefix, reporting = _prefix(phase.training), self._reporting
        if reporter is reporting.uncertainty:
            reporter.explain(phase.lines.get("uncertainty", ""))
            reporting.uncertainty.describe(phase.note)
            yield from (
                Piece(reporter, [of_loop(name, loop) for name in names], rows, prefix)
                for names, rows in _rows_of(phase, "uncertainty")
            )
        elif reporter is reporting.calibration:
            reporter.explain(phase.lines.get("calibration", ""))
            reporting.calibration.expect(phase.outputs)
            yield from _of_calibration(reporting.calibration, phase, prefix, loop)
            yield from _of_coverage(reporting.calibration, phase, prefix)


class _Reporting:
    """The reporters that there are, by what they report."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        uncertainty = next((r for r in reporters if r.source == "uncertainty"), None)
        calibration = next((r for r in reporters if r.source == "calibration"), None)
        self.uncertainty = cast("UncertaintyReporter | None", uncertainty)
        self.calibration = cast("CalibrationReporter | None", calibration)
        self.options = Uncertainty() if uncertainty is None else cast("Uncertainty", uncertainty.probe)

    def recognised(self) -> str | None:
        """The form of the model's plain output, as far as the drain thread knows."""
        reporter = self.uncertainty or self.calibration
        return None if reporter is None else reporter.evidence.recognised

    def remark(self, line: str) -> None:
        reporter = self.calibration or self.uncertainty
        if line and reporter is not None:
            reporter.remark(line)

    def explain(self, reason: str) -> None:
        for reporter in (self.uncertainty, self.calibration):
            if reporter is not None:
                reporter.explain(reason)


def _of_coverage(reporter: CalibrationReporter, phase: Phase, prefix: str) -> Iterator[Piece]:
    """How often targets were in their intervals."""
    for names, rows in phase.coverage.rows():
        phases = [_phase_name(phase.training)] * len(names)
        yield Piece(reporter.coverage, phases, rows[:, : -len(EVIDENCE)], prefix)


def _of_calibration(reporter: CalibrationReporter, phase: Phase, prefix: str, loop: str) -> Iterator[Piece]:
    training = phase.training
    for names, rows in _rows_of(phase, "calibration"):
        flags = _flags(rows, phase.moment).expand(len(rows), -1)
        own = [_name(name, training) for name in names]
        yield Piece(reporter, [of_loop(name, loop) for name in own], torch.cat((rows, flags), 1), prefix)
        yield _of_gap(reporter, own, rows)
    if phase.unjudged and not training and not phase.coverage:
        nothing = torch.zeros(1, reporter.probe.width, dtype=torch.float64)
        yield Piece(reporter, [_name(f"|{UNJUDGED}", training)], nothing, prefix)


def _rows_of(phase: Phase, kind: Literal["uncertainty", "calibration"]) -> Iterator[tuple[list[str], Tensor]]:
    """For each device names and rows, of all outputs."""
    yield from getattr(phase, kind).rows()
    for head, other in phase.heads.items():
        yield from (([of_head(name, head) for name in names], rows) for names, rows in getattr(other, kind).rows())


def _of_gap(reporter: CalibrationReporter, names: Sequence[str], rows: Tensor) -> Piece:
    """What both phases are compared by."""
    slim = torch.cat((rows[:, : len(calibration.HEADER)], rows[:, len(calibration.FIELDS) :]), 1)
    return Piece(reporter.gap, names, slim[:, : len(calibration.HEADER) + len(EVIDENCE)], "")


def _flags(like: Tensor, moment: Moment) -> Tensor:
    return like.new_full((len(FLAGS),), float(moment.pictures))


def _name(name: str, training: bool) -> str:
    return f"{name}|{_phase_name(training)}"


def _phase_name(training: bool) -> str:
    return "train" if training else "val"


def _prefix(training: bool) -> str:
    return "" if training else "val/"
