"""A step moves a parameter far too much, or not at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torchprobe.naming import owner_of
from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found, group, not_finite, positive, scalar

_NEGLIGIBLE = 1e-2  # of the norm of all parameters


class UpdateRatio:
    """A step's norm over the parameter's is above `high` or below `low`. Source: SageMaker Debugger.

    Healthy, and left alone: a small ratio because the learning rate is 0 or small beside the largest seen (warm-up,
    the end of a schedule: the ratio is compared as if the rate were the largest); one parameter of a module that
    stands still while others move (a bias in front of BatchNorm has no gradient); a frozen one; no movement at step 1
    without a gradient (behind weights that begin at zero, as in LoRA); a large ratio of a parameter whose norm is
    still under 1 % of the model's (a bias that passes through zero).
    """

    name = "update_ratio"

    def __init__(self, high: float = 10.0, low: float = 1e-8) -> None:
        self.high = positive("high", high)
        self.low = positive("low", low)
        self._largest_rate = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The largest learning rate seen, for a resumed run."""
        return {"largest_rate": self._largest_rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._largest_rate = float(state["largest_rate"])

    def __call__(self, record: Record) -> Found:
        """One alert a parameter."""
        pace = self._pace(record)
        ratios = dict(group(record, "update_ratio"))
        if not ratios or not_finite(record):
            return None
        return [*self._too_large(record, ratios), *(self._too_small(record, ratios, pace) if pace else ())]

    def _pace(self, record: Record) -> float:
        """The learning rate over the largest seen; 1 when it is not recorded."""
        rates = [rate for _, rate in group(record, "lr")]
        if not rates:
            return 1.0
        self._largest_rate = max(self._largest_rate, *rates)
        return max(rates) / self._largest_rate if self._largest_rate > 0 else 0.0

    def _too_large(self, record: Record, ratios: Mapping[str, float]) -> Iterator[Alert]:
        least = _NEGLIGIBLE * (scalar(record, "overview/param_norm") or 0.0)
        message = "one step moved the parameter by many times its own norm"
        for name, ratio in ratios.items():
            norm = scalar(record, f"param_norm/{name}")
            if ratio > self.high and (norm is None or not norm < least):
                yield Alert(self.name, record.step, name, ratio, self.high, message)

    def _too_small(self, record: Record, ratios: Mapping[str, float], pace: float) -> Iterator[Alert]:
        modules: defaultdict[str, list[float]] = defaultdict(list)
        for name, ratio in ratios.items():
            modules[owner_of(name)].append(ratio)
        message = "the step hardly moved the parameter, nor the others of its module"
        trained = any(tag.startswith("grad_norm/") for tag in record.values)
        for name, ratio in ratios.items():
            gradient = scalar(record, f"grad_norm/{name}")
            frozen = trained and gradient is None
            begins = record.step == 1 and gradient == 0
            if max(modules[owner_of(name)]) < self.low * pace and not frozen and not begins:
                yield Alert(self.name, record.step, name, ratio, self.low, message)
