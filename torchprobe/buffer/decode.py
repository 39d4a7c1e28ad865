"""Host rows to records, in the drain thread."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torchprobe.buffer.seal import SKIPPED, Sealed
from torchprobe.buffer.step import Arrived, Reporter, by_reporter, grouped
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
            found = by_reporter(parts)
            tagged = {prefix + tag: value for tag, value in _reported(reporter, found)}
        except Exception:
            self._failed.add(reporter)
            _log.exception("the report of %s failed and is left out from now on", _name(reporter))
            return {}
        if tagged or getattr(reporter, "rows_suffice", True):
            self._seen.update(getattr(part, "speaks_for", part) for part in found)
        if found:
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
            failed = getattr(reporter, "whole", reporter) in self._failed
            if self._asked[reporter] == _PATIENCE and reporter not in self._seen and not failed:
                name, source = _name(reporter), getattr(reporter, "source", "")
                self.missing.append(name)
                known = _REASONS.get(source, "nothing of the kind it watches occurred")
                reason = getattr(reporter, "reason", "") or known
                text = f"{name} saw nothing in its first {_PATIENCE} sampled steps ({reason})"
                serious = self._asked_for or getattr(reporter, "found_everywhere", True)
                _log.log(logging.WARNING if serious else logging.INFO, "nothing captured: %s", text)
                if serious:
                    texts[f"nothing_captured/{name}"] = Text(text)
        return texts


def _reported(reporter: Any, found: Mapping[Reporter, tuple[Sequence[str], Any]]) -> Iterable[tuple[str, Value]]:
    """Tags and values of one source, or of several together."""
    if reporter in found:
        return cast("Iterable[tuple[str, Value]]", reporter.report_all(*found[reporter]))
    rows = {getattr(part, "source", ""): named for part, named in found.items()}
    return cast("Iterable[tuple[str, Value]]", reporter.report_sources(rows)) if rows else ()


def _name(reporter: Reporter) -> str:
    return str(getattr(reporter, "name", type(reporter).__name__))
