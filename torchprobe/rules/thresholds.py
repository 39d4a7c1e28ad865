"""Rules that compare the values of one step with thresholds and remember nothing: each is the watcher of every run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.base import BuiltIn, Found, group, scalar


@dataclass(frozen=True)
class _Threshold(BuiltIn):
    """One alert for each module whose number under `<values>/<module>` is above the threshold."""

    threshold: float

    values: ClassVar[str]
    message: ClassVar[str]

    def __call__(self, record: Record) -> Found:
        """One alert a module."""
        values = dict(group(record, self.values))
        if not values:
            return None
        return [
            Alert(self.name, record.step, module, value, self.threshold, self.message)
            for module, value in values.items()
            if self._holds(record, module, value)
        ]

    def _holds(self, record: Record, module: str, value: float) -> bool:
        return value > self.threshold


@dataclass(frozen=True)
class AttentionCollapse(_Threshold):
    """A head's mean entropy is below `threshold` nats: one alert a module, with the entropy of its lowest head.

    Source: Zhai et al. 2023 on entropy collapse. Attention in which every query sees one key only has no entropy to
    lose and is left alone.
    """

    threshold: float = 0.1

    name = "attention_collapse"
    values = "attention_entropy_min"
    message = "a head attends to hardly more than one key: its mean entropy in nats is below the threshold"

    def _holds(self, record: Record, module: str, value: float) -> bool:
        return value < self.threshold and scalar(record, f"attention_entropy_normalized/{module}") is not None


@dataclass(frozen=True)
class AttentionLogitGrowth(_Threshold):
    """The largest signed logit of an attention, after scale and mask, is above `threshold` (the default of QK-clip)."""

    threshold: float = 100.0

    name = "attention_logit_growth"
    values = "attention_max_logit"
    message = "the largest attention logit is above the threshold: the softmax saturates"


@dataclass(frozen=True)
class DeadUnits(_Threshold):
    """More than `threshold` of the units behind a ReLU are active on under 1 % of inputs. Source: SageMaker Debugger.

    Reads `dead_units/<module>` of the `UnitActivity` probe.
    """

    threshold: float = 0.5

    name = "dead_units"
    values = "dead_units"
    message = "units of the layer are active on under 1 % of inputs: a larger share than the threshold"


@dataclass(frozen=True)
class Overconfidence(BuiltIn):
    """Confidence gap above `gap` and ECE above `ece`, over at least `predictions` predictions.

    Reads `calibration/confidence_gap`, `calibration/ece` and `calibration/count`; those of validation (`val/…`) have
    an alert of their own.
    """

    gap: float = 0.1
    ece: float = 0.1
    predictions: int = 1000

    name = "overconfidence"

    def __call__(self, record: Record) -> Found:
        """At most one alert for training and one for validation."""
        found: list[Alert] = []
        said = False
        for prefix, where in (("", None), ("val/", "val")):
            gap, ece, count = (scalar(record, f"{prefix}calibration/{n}") for n in ("confidence_gap", "ece", "count"))
            if gap is None or ece is None or count is None or count < self.predictions:
                continue
            said = True
            if gap > self.gap and ece > self.ece:
                message = f"confidence exceeds accuracy, ECE {ece:.3g}, over {count:.0f} predictions"
                found.append(Alert(self.name, record.step, where, gap, self.gap, message))
        return found if said else None
