"""Predictions of a step as rows for the buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.predictions.capture import PredictionCapture
from torchprobe.capture.predictions.phase import Phase
from torchprobe.capture.predictions.settled import Settled
from torchprobe.probes.base import Reporter
from torchprobe.probes.calibration import FLAGS, UNJUDGED, CalibrationReporter
from torchprobe.probes.evidence import EVIDENCE
from torchprobe.probes.uncertainty import Uncertainty, UncertaintyReporter
from torchprobe.statistics import calibration

_SAMPLES_A_PICTURE = 10  # sampled steps


class PredictionPieces:
    """The uncertainty and calibration probes on a model; they share what is read of its outputs."""

    def __init__(
        self, model: ReferenceType[nn.Module], reporters: Iterable[Reporter], meter: Meter, flush_every: int
    ) -> None:
        self._reporters = [r for r in reporters if r.source in ("uncertainty", "calibration")]
        uncertainty = next((r for r in self._reporters if r.source == "uncertainty"), None)
        found = next((r for r in self._reporters if r.source == "calibration"), None)
        self._uncertainty = cast("UncertaintyReporter | None", uncertainty)
        self.calibration = cast("CalibrationReporter | None", found)
        self._shared = Gate("Uncertainty and Calibration", meter)
        settled = Settled(self._recognised)
        options = Uncertainty() if uncertainty is None else cast("Uncertainty", uncertainty.probe)
        self._capture = PredictionCapture(model, options, self._shared, settled)
        self._flush_every = flush_every
        self._window, self._sampled = 0, 0
        self._pictures_due = False
        self._following = False  # the pass that runs, or has just returned, is read
        self.on_backward = self._capture.on_backward
        self.on_recomputed = self._capture.on_recomputed

    def open_for(self, step: int) -> None:
        """A step begins."""
        self._window = step // self._flush_every
        self._pictures_due = self._sampled % _SAMPLES_A_PICTURE == 0
        self._sampled += any([r.gate.train and r.is_regular(step) for r in self._reporters])  # noqa: C419 - as above

    def is_open(self, training: bool) -> bool:
        """Whether a pass is sampled."""
        if self._shared.failed:
            return False
        gates = [reporter.gate for reporter in self._reporters]
        return any([gate.train if training else gate.val for gate in gates])  # noqa: C419 - as a generator, more calls

    def enter(self, due: bool, training: bool) -> None:
        """A pass begins; due: whether any probe samples it."""
        if self._following:
            self._capture.end_pass()
        self._following = due and self.is_open(training)
        if self._following:
            self._capture.enter(training)

    def leave(self) -> None:
        """A pass has ended, before `on_output`, or raised."""
        if self._following:
            self._capture.leave()

    def on_output(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """A pass has returned."""
        if self._following:
            self._capture.on_output(module, args, kwargs, output)

    def collect(self, training: bool) -> list[Piece]:
        """Everything since the last call, for the probes that are due."""
        if not self._capture.has_any(training):
            return []
        phase = self._capture.take(training)
        due = [r for r in self._reporters if (r.gate.train if training else r.gate.val)]
        prefix = "" if training else "val/"
        return [piece for r in due if not self._shared.failed for piece in self._pieces(r, phase, prefix)]

    def explain(self, reason: str) -> None:
        """Why nothing can be seen at all."""
        for reporter in self._reporters:
            reporter.explain(reason)

    def given(self, predictions: Tensor, targets: Tensor, training: bool) -> Piece | None:
        """Predictions that the user handed in."""
        if self.calibration is None or self._shared.failed:
            return None
        row = None
        with self._shared.boundary(), torch.no_grad(), torch._C.DisableTorchFunction():
            row = calibration.compute(predictions, targets)
            row = torch.cat((row, row.new_zeros(len(EVIDENCE)), self._flags(row, training)))
        if row is None:
            return None
        return Piece(self.calibration, [_name("|given", training)], row[None], "" if training else "val/")

    def detach(self) -> None:
        """Take everything off."""
        self._capture.detach()

    def _pieces(self, reporter: Reporter, phase: Phase, prefix: str) -> Iterator[Piece]:
        if reporter is self._uncertainty:
            reporter.explain(self._capture.unread)
            self._uncertainty.describe(self._capture.note)
            yield from (Piece(reporter, names, rows, prefix) for _, names, rows in phase.uncertainty.rows())
        elif reporter is self.calibration:
            reporter.explain(self._capture.unjudged)
            yield from self._of_calibration(self.calibration, phase, prefix)
            yield from _of_coverage(self.calibration, phase, prefix, self._window)

    def _of_calibration(self, reporter: CalibrationReporter, phase: Phase, prefix: str) -> Iterator[Piece]:
        training = phase.training
        for _, names, rows in phase.calibration.rows():
            flags = self._flags(rows, training).expand(len(rows), -1)
            yield Piece(reporter, [_name(name, training) for name in names], torch.cat((rows, flags), 1), prefix)
        if phase.unjudged and not training and not phase.calibration:
            nothing = torch.zeros(1, reporter.probe.width, dtype=torch.float64)
            yield Piece(reporter, [_name(f"|{UNJUDGED}", training)], nothing, prefix)

    def _recognised(self) -> str | None:
        """The form of the model's plain output, as far as the drain thread knows."""
        reporter = self._uncertainty or self.calibration
        return None if reporter is None else reporter.evidence.recognised

    def _flags(self, like: Tensor, training: bool) -> Tensor:
        pictures = self._pictures_due or not training
        values = zip(FLAGS, (float(self._window), float(pictures), 1.0), strict=True)
        return torch.stack([like.new_full((), value) for _, value in values])


def _of_coverage(reporter: CalibrationReporter, phase: Phase, prefix: str, window: int) -> Iterator[Piece]:
    for _, names, rows in phase.coverage.rows():
        found = rows[:, : -len(EVIDENCE)]
        number, one = found.new_full((len(found), 1), float(window)), found.new_ones(len(found), 1)
        numbered = torch.cat((found, number, one), 1)
        yield Piece(reporter.coverage, ["train" if phase.training else "val"] * len(names), numbered, prefix)


def _name(name: str, training: bool) -> str:
    return f"{name}|{'train' if training else 'val'}"
