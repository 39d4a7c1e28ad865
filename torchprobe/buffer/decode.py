"""Host rows to records, in the drain thread."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from torchprobe.buffer.seal import SKIPPED, Sealed
from torchprobe.buffer.step import Joined, Reporter, join
from torchprobe.records import Record, Value

_PATIENCE = 3  # sampled steps
_REASONS = {
    "outputs": "no chosen module ran with a floating-point output; look at include= and exclude=",
    "output_gradients": "no chosen module's output needed a gradient; look at include= and exclude=",
    "gradients": "no parameter of the model had a gradient when an optimizer stepped",
    "parameters": "no optimizer held a parameter of the model that include= and exclude= leave",
    "updates": "no optimizer held a parameter of the model that include= and exclude= leave",
    "loss": "no loss module ran on the model's output, it returned no `loss`, and backward() was not seen",
}

_log = logging.getLogger("torchprobe")


class Decoder:
    """Lets each probe report its rows. A probe whose report raises is left out from then on, logged once.

    skipped counts the steps that a fused optimizer turned out to have skipped: they give no record.
    """

    def __init__(self, descriptions: Mapping[str, str]) -> None:
        self._descriptions = descriptions
        self._failed: set[Reporter] = set()
        self.skipped = 0
        self._seen: set[Reporter] = set()
        self._asked: Counter[Reporter] = Counter()
        self.missing: list[str] = []

    def __call__(self, sealed: Sealed) -> Record | None:
        values: dict[str, Value] = dict(sealed.values)
        joined = list(join(sealed.arrive()))
        if any(part.reporter is SKIPPED and part.rows[0, 0] > 0 for part in joined):
            self.skipped += 1
            return None
        for part in joined:
            values.update(self._report(part))
        self._look_for_missing(sealed.due)
        return Record(sealed.step, sealed.wall_time, values, self._descriptions) if values else None

    def _report(self, part: Joined) -> dict[str, Value]:
        if part.reporter in self._failed:
            return {}
        try:
            tagged = {part.prefix + tag: value for tag, value in part.reporter.report_all(part.names, part.rows)}
        except Exception:
            self._failed.add(part.reporter)
            _log.exception("the report of %s failed and is left out from now on", type(part.reporter).__name__)
            return {}
        self._seen.add(part.reporter)
        return tagged

    def _look_for_missing(self, due: Sequence[Reporter]) -> None:
        self._asked.update(due)
        for reporter in due:
            if self._asked[reporter] == _PATIENCE and reporter not in self._seen | self._failed:
                name = type(reporter).__name__
                self.missing.append(name)
                _log.warning(
                    "nothing captured: %s saw nothing in its first %d sampled steps (%s)",
                    name,
                    _PATIENCE,
                    _REASONS.get(getattr(reporter, "source", ""), "nothing of the kind it watches occurred"),
                )
