"""Calibration: whether a model that says 80 % hits in 80 % of the cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from torchprobe.pictures import pit_chart, precision_recall_curve, reliability_diagram, risk_coverage_curve
from torchprobe.probes.base import InValidation, Probe, Reporter
from torchprobe.probes.evidence import EVIDENCE, SURE, Evidence, Luck, added_up, by_loop, form_of, head_of, is_open
from torchprobe.records import EVIDENCE as FOR_RULES
from torchprobe.records import ONE_CLASS, Histogram, Value
from torchprobe.statistics import calibration, intervals

GIVEN, FOUND, UNJUDGED = "given", "found", "unjudged"
"""Where predictions and targets come from: `session.log_predictions`, or the loop; or targets were never seen."""

FLAGS = ("pictures",)
"""Columns behind the evidence: whether pictures are due."""

_EVIDENCE = slice(-len(EVIDENCE) - len(FLAGS), -len(FLAGS))
_COUNTS = ("count", "ignored", "invalid")
_COUNT, _CORRECT, _NLL = (calibration.FIELDS.index(name) for name in ("count", "correct", "nll"))
_GAP_EVIDENCE = slice(len(calibration.HEADER), len(calibration.HEADER) + len(EVIDENCE))
_COUNTED = [calibration.FIELDS.index(name) for name in _COUNTS]
_IGNORED = calibration.FIELDS.index("ignored")
_SCORES = [i for i, name in enumerate(calibration.FIELDS) if name.startswith("scores_")]
_NO_TARGETS = (
    "no targets were seen: the gradient at the model's output is that of no cross-entropy of it alone (soft or mixed "
    "targets, weights with smoothing, a policy, the best of several passes or outputs, the hardest examples), or may "
    "be of samples, where random numbers were drawn after the pass; use nn.CrossEntropyLoss() or the like on the "
    "output, or call session.log_predictions(probs, targets)"
)
_ITS_OWN = (
    "calibration: so far all targets are the model's own likeliest classes, though it is not that sure of them: as "
    "pseudo-labels they say nothing of it; where they are not, call session.log_predictions(probs, targets)"
)


def _descriptions(notes: str) -> dict[str, str]:
    text = "Top-label calibration in 15 equal-width bins; gap is mean confidence - accuracy, above 0 is over-confident"
    return {
        "calibration": f"{text} ({notes or 'exact'}).",
        "calibration_reliability": "Accuracy over confidence, and how many predictions are in each bin.",
        "calibration_risk_coverage": "Accuracy when only the share of the predictions that are most certain is kept.",
        "calibration_precision_recall": "Precision over recall of class 1, as the threshold falls.",
    }


class Calibration(Probe):
    """Calibration of class predictions: `calibration/ece`, `mce`, `adaptive_ece`, `brier`, `nll`, `accuracy`, ...

    Targets come from the loss that the model returns (its graph, or recomputed from a `labels=` or `targets=`), from
    a loss module of torch's that judges the output, confirmed by the gradient, from the gradient at the output
    alone, which is s (p - y) for a cross-entropy, or from `session.log_predictions(probs, targets)`, which takes
    precedence. Of any other loss nothing is claimed, and a line in `session.summary()` says what would settle it. In
    validation without gradients a returned loss, a loss module and the call work. With both phases:
    `overview/generalisation_gap_nll` and `..._accuracy`, validation minus the last sampled step of training.

    Training: over the sampled step. Validation: over the whole pass, under `val/`; what loops at several lines of the
    program gave is also apart, as `val/calibration/ece/loop_1`. Of several outputs the first has the plain tags, others
    `calibration/ece/<output>`. Regression: `calibration/coverage_50` and `coverage_90`, and a histogram of the PIT,
    when a variance is known (`GaussianNLLLoss`, or a mean with a variance under `MSELoss`); in training also from the
    gradients of any Gaussian likelihood, as `-Normal(mean, std).log_prob(y).mean()`. Memory is bounded: sums in bins.
    """

    source: ClassVar[str] = "calibration"
    found_everywhere: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = (*calibration.FIELDS, *EVIDENCE, *FLAGS)
    reduce = "sum"
    in_validation: InValidation = "all"
    descriptions: Mapping[str, str] = _descriptions("")

    def reporter(self) -> CalibrationReporter:
        """Keeps what has been learnt of the output."""
        return CalibrationReporter(self)


class CalibrationReporter(Reporter):
    """Calibration in one session."""

    rows_suffice: ClassVar[bool] = False

    def __init__(self, probe: Calibration) -> None:
        super().__init__(probe)
        self.coverage = Coverage(self)
        self.gap = GeneralisationGap(self)
        self.beside = (self.coverage, self.gap)
        self.evidence = Evidence()
        self._outputs: tuple[str, ...] = ()
        self._judges = False  # some predictions were judged, so that where none are that is worth a line
        self._unread = False  # the gradient told no targets: worth a line once something else tells some in validation
        self._luck = Luck()
        self._classes = np.zeros(2)  # targets of either class of two, as the gradient told them in training

    def learn(self, names: Sequence[str], rows: NDArray[np.float64]) -> None:
        """Whether the model's plain output holds classes."""
        self.evidence.weigh({name: row[_EVIDENCE] for name, row in added_up(names, rows).items()})

    def expect(self, outputs: tuple[str, ...]) -> None:
        """The names of the model's outputs, where there are several."""
        self._outputs = outputs

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """A name is `<form>|<origin>|<phase>`, of another output than the first `<form>@<output>|...`, of one loop of
        several `...~<loop>`; one phase at a time.
        """
        self.learn(names, rows)
        loops = by_loop(names, rows)
        yield from self._of_all(names, loops.pop(""))
        for loop, found in loops.items():
            known = self._known(found)
            yield from self._named(known, {output: f"{output}.{loop}".lstrip(".") for output in map(head_of, known)})

    def _known(self, found: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """Rows in which anything was judged, or found to be no prediction."""
        return {name: row for name, row in found.items() if self.evidence.holds(name) and row[_COUNTED].any()}

    def _of_all(self, names: Sequence[str], found: Mapping[str, NDArray[np.float64]]) -> Iterator[tuple[str, Value]]:
        known = self._known(found)
        self._judges |= any(f"|{GIVEN}|" not in name for name in known)
        first = _of_output("", known)
        for row in first.values():
            self._luck.add(row[_COUNT], row[_CORRECT], row[_NLL])
        name = _preferred(list(first))
        if name is not None and self.may_be_its_own(name):
            self.remark(_ITS_OWN)
        elif name is None or is_open(known[name][_EVIDENCE]):
            self._explain(names, found, name)
        else:
            self._unread &= not name.endswith("|train")
            self.remark(f"calibration in training: {_NO_TARGETS}" if self._unread else "")
            self._note(name, known[name])
            row, pictures = known[name][: len(calibration.FIELDS)], known[name][-1]
            yield from self._tags(row, by_hand=f"|{GIVEN}|" in name)
            if self._is_of_one_class(name, row):
                yield FOR_RULES + ONE_CLASS, 1.0
            if pictures:
                yield from _pictures(row)
        yield from self._named(known, {output: output for output in self._outputs})
        judged = [output for output in self._outputs if _of_output(output, known)]
        judged += self._outputs[:1] if name is not None else ()
        if judged and len(judged) < len(self._outputs):
            self.remark(
                f"calibration: of the model's several outputs ({', '.join(self._outputs)}) no targets were seen but of "
                f"{', '.join(judged)}; for another call session.log_predictions(probs, targets)"
            )

    def _named(
        self, known: Mapping[str, NDArray[np.float64]], labels: Mapping[str, str]
    ) -> Iterator[tuple[str, Value]]:
        """Numbers of some outputs under names of their own, by output."""
        for output, label in labels.items():
            name = _preferred(list(_of_output(output, known)))
            if name is not None and not is_open(known[name][_EVIDENCE]):
                for key, value in calibration.summarise(known[name][: len(calibration.FIELDS)]).items():
                    yield f"calibration/{key}/{label}", value

    def _is_of_one_class(self, name: str, row: NDArray[np.float64]) -> bool:
        """Whether all targets so far are of one class of two: positives alone, where negatives are another output."""
        if not name.endswith("|train") or f"|{GIVEN}|" in name:
            return False
        self._classes += row[_SCORES].reshape(2, -1).sum(1)
        return int(np.count_nonzero(self._classes)) == 1

    def may_be_its_own(self, name: str) -> bool:
        """Whether targets that the gradient alone told may be made of the predictions themselves."""
        return not name.startswith("|") and self._luck.is_odd

    def _tags(self, row: NDArray[np.float64], by_hand: bool) -> Iterator[tuple[str, Value]]:
        found = calibration.summarise(row)
        if found["invalid"]:
            yield "calibration/invalid", found["invalid"]
            self._warn_of_invalid(found["invalid"], by_hand)
        for key, value in found.items():
            if key not in _COUNTS:
                yield f"calibration/{key}", value
        if found["count"]:
            yield "calibration/count", found["count"]
            yield "overview/ece", found["ece"]

    def _warn_of_invalid(self, count: float, by_hand: bool) -> None:
        if not any("no probabilities" in line for line in self.remarks):
            advice = "; log_predictions takes probs.softmax(-1), not logits" if by_hand else ""
            self.remark(
                f"calibration: {count:.0f} predictions are no probabilities (NaN, negative, or not adding up to 1), or "
                f"have a target that is no class, and are left out{advice}"
            )

    def _explain(self, names: Sequence[str], found: Mapping[str, NDArray[np.float64]], open_form: str | None) -> None:
        if any(f"|{UNJUDGED}|" in name for name in names):
            if not (self.evidence.any or self._judges or self.coverage.judged):
                return  # in training neither: perhaps it predicts no classes
            self.remark(
                "calibration in validation: no targets were seen, as without a gradient a functional loss leaves no "
                "trace, nor does a loss module on a part of the output, or on what was computed of it; use one on the "
                "output, hand the model its labels=, or call session.log_predictions(probs, targets)"
            )
        elif open_form is not None:
            self.remark(
                "calibration: targets of very sure predictions left no gradient, and the scale of the loss does not "
                "tell whether they count; use a loss module, or call session.log_predictions(probs, targets)"
            )
        elif not self.reason and any(row[_EVIDENCE][0] > 0 for row in found.values()):
            self._unread |= any(name.endswith("|train") for name in found)
            self.explain(_NO_TARGETS)

    def _note(self, name: str, row: NDArray[np.float64]) -> None:
        notes = [f"of the first output, {self._outputs[0]}"] if self._outputs else []
        notes += ["a sample of rows"] if row[_EVIDENCE][3] else []
        if row[_IGNORED]:
            notes.append("without rows that the loss left out, ignored or masked")
        if row[_SCORES].any():
            notes.append(f"auroc and average_precision within {calibration.RANKING_BOUND:.3g}, left out where coarser")
        self.descriptions = _descriptions(", ".join(notes))


def _of_output(output: str, rows: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    return {name: row for name, row in rows.items() if head_of(name) == output}


class Coverage(Reporter):
    """How often targets are inside the intervals that a regression predicts."""

    rows_suffice: ClassVar[bool] = False

    def __init__(self, speaks_for: CalibrationReporter) -> None:
        super().__init__(speaks_for.probe)
        self.speaks_for, self.judged = speaks_for, False
        self.descriptions = {
            "calibration_pit": "Where targets fall in their predicted distribution: even when variances are right.",
        }

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Names are phases."""
        for total in added_up(names, rows).values():
            self.judged |= bool(total.any())
            for key, value in intervals.summarise(total).items():
                if key not in _COUNTS:
                    yield f"calibration/{key}", value
            edges, counts = intervals.pit_histogram(total)
            if counts.any():
                yield "calibration_pit/targets", Histogram(edges, counts)
                yield "calibration_pit_chart/targets", pit_chart(edges, counts)


class GeneralisationGap(Reporter):
    """How much worse the same output is judged in validation than in the last sampled step of training before it.

    Rows are the first columns of those of calibration, with their evidence; names are theirs.
    """

    rows_suffice: ClassVar[bool] = False

    def __init__(self, speaks_for: CalibrationReporter) -> None:
        super().__init__(speaks_for.probe)
        self.speaks_for = speaks_for
        self._trained: dict[bool, tuple[float, float]] = {}  # by whether predictions were handed in: NLL, accuracy
        self.descriptions: Mapping[str, str] = {}

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Of both phases together."""
        found = added_up(names, rows)
        evidence = self.speaks_for.evidence
        evidence.weigh({name: row[_GAP_EVIDENCE] for name, row in found.items()})
        judged = {name: row for name, row in _of_output("", found).items() if evidence.holds(name) and row[_COUNT] > 0}
        judged = {name: row for name, row in judged.items() if not self.speaks_for.may_be_its_own(name)}
        by_phase = {p: _preferred([n for n in judged if n.endswith(f"|{p}")]) for p in ("train", "val")}
        for phase, name in by_phase.items():
            if name is None:
                continue
            row, given = judged[name], f"|{GIVEN}|" in name
            nll, accuracy = row[_NLL] / row[_COUNT], row[_CORRECT] / row[_COUNT]
            if phase == "train":
                self._trained[given] = nll, accuracy
            elif given in self._trained:
                yield "overview/generalisation_gap_nll", float(nll - self._trained[given][0])
                yield "overview/generalisation_gap_accuracy", float(accuracy - self._trained[given][1])


def _pictures(row: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
    """What there is to draw: a binary task alone has precision and recall."""
    drawers = (
        ("reliability", calibration.reliability, reliability_diagram),
        ("risk_coverage", calibration.risk_coverage, risk_coverage_curve),
        ("precision_recall", calibration.precision_recall, precision_recall_curve),
    )
    for name, curve_of, draw in drawers:
        curve = curve_of(row)
        if curve:
            yield f"calibration_{name}/predictions", draw(curve)


def _preferred(names: Sequence[str]) -> str | None:
    """What the user handed in, then what a loss module or labels told, then what the gradient did."""
    judged = [name for name in names if f"|{UNJUDGED}|" not in name]
    return min(judged, key=lambda name: (f"|{GIVEN}|" not in name, form_of(name) != SURE)) if judged else None
