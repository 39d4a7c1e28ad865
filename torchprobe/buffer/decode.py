"""Host rows to records, in the drain thread."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torchprobe.buffer.seal import SKIPPED, Sealed
from torchprobe.buffer.step import Arrived, Reporter, grouped, joined
from torchprobe.records import Record, Text, Value

_PATIENCE = 3  # sampled steps
_NOT_HELD = "no torch.optim optimizer held a parameter of the model that include= and exclude= leave"

_REASONS = {
    "outputs": "no chosen module ran with a floating-point output; look at include= and exclude=",
    "output_gradients": "no chosen module's output needed a gradient; look at include= and exclude=",
    "gradients": "no parameter of the model had a gradient when a torch.optim optimizer stepped, or none stepped",
    "parameters": _NOT_HELD,
    "updates": _NOT_HELD,
    "attention": "no attention was seen; session.summary() counts what was not covered, and why",
    "uncertainty": "the model returned no named uncertainty, no distribution, and no logits that a cross-entropy told; "
    "Uncertainty(task='classification') or task='regression' says what a plain output is",
    "calibration": "no labels=, loss module or gradient told the targets of class predictions; "
    "session.log_predictions(probs, targets) takes them",
    "loss": "no loss module ran on the model's output, it returned no `loss`, and backward() was not seen",
}

_NO_REASON = "nothing of the kind it watches occurred"

_log = logging.getLogger("torchprobe")


class Decoder:
    """Lets each probe report its rows. A probe whose report raises is left out from then on, logged once.

    skipped counts the steps that a fused optimizer turned out to have skipped: they give no record.
    missing names the probes that saw nothing in their first three sampled steps, each logged once: as a warning,
    unless the user did not ask for the probe (asked_for) and a model need not have what it watches.
    """

    def __init__(self, descriptions: Mapping[str, str], asked_for: bool = True) -> None:
        self.skipped = 0
        self.missing: list[str] = []
        self._descriptions = dict(descriptions)
        self._asked_for = asked_for
        self._failed: set[Reporter] = set()
        self._seen: set[Reporter] = set()
        self._asked: Counter[Reporter] = Counter()
        self._lost = False

    def __call__(self, sealed: Sealed) -> Record | None:
        """The record of a step; None when it has no values. Raises what a device raised."""
        return self.record(sealed, sealed.arrive())

    def record(self, sealed: Sealed, arrived: Iterable[Arrived]) -> Record | None:
        """The record of a step whose rows are on the host."""
        groups = grouped(arrived)
        if any((flag.rows > 0).any() for flag in groups.get((SKIPPED, ""), ())):
            self.skipped += 1
            return None
        values: dict[str, Value] = dict(sealed.values)
        for (reporter, prefix), parts in groups.items():
            values.update(self._report(reporter, prefix, parts))
        values.update(self._explain_gaps(sealed))
        return Record(sealed.step, sealed.wall_time, values, self._descriptions, bool(sealed.due)) if values else None

    def _report(self, reporter: Reporter, prefix: str, parts: Sequence[Arrived]) -> dict[str, Value]:
        if reporter in self._failed:
            return {}
        try:
            names, rows = joined(parts)
            tagged = {prefix + tag: value for tag, value in reporter.report_all(names, rows)} if names else {}
        except Exception:
            self._failed.add(reporter)
            _log.exception("the report of %s failed and is left out from now on", type(reporter).__name__)
            return {}
        if tagged or (names and not hasattr(reporter, "reason")):  # one that has a reason may report nothing
            self._seen.add(getattr(reporter, "speaks_for", reporter))
        if names:
            self._descriptions.update(getattr(reporter, "descriptions", {}))
        return tagged

    def _explain_gaps(self, sealed: Sealed) -> dict[str, Value]:
        if not sealed.lost:
            return self._look_for_missing(sealed.due)
        if not self._lost:
            self._lost = True
            _log.warning("step %d found no free slots on its device: its statistics are lost", sealed.step)
        return {}

    def _look_for_missing(self, due: Sequence[Reporter]) -> dict[str, Value]:
        self._asked.update(due)
        texts: dict[str, Value] = {}
        for reporter in due:
            if self._asked[reporter] == _PATIENCE and reporter not in self._seen | self._failed:
                name, source = type(reporter).__name__, getattr(reporter, "source", "")
                self.missing.append(name)
                known = _REASONS.get(source, "nothing of the kind it watches occurred")
                reason = getattr(reporter, "reason", "") or known
                text = f"{name} saw nothing in its first {_PATIENCE} sampled steps ({reason})"
                serious = self._asked_for or getattr(reporter, "found_everywhere", True)
                _log.log(logging.WARNING if serious else logging.INFO, "nothing captured: %s", text)
                if serious:
                    texts[f"nothing_captured/{name}"] = Text(text)
        return texts
