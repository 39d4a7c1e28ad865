"""The model is surer than it is right."""

from __future__ import annotations

from torchprobe.arguments import check_count
from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found, positive, scalar

_WHERE = {"": None, "val/": "val"}


class Overconfidence:
    """Confidence gap above `gap` and ECE above `ece`, over at least `predictions` predictions.

    Reads `calibration/confidence_gap`, `calibration/ece` and `calibration/count`; those of validation (`val/…`) have
    an alert of their own.
    """

    name = "overconfidence"

    def __init__(self, gap: float = 0.1, ece: float = 0.1, predictions: int = 1000) -> None:
        self.gap = positive("gap", gap)
        self.ece = positive("ece", ece)
        self.predictions = check_count("predictions", predictions)

    def __call__(self, record: Record) -> Found:
        """At most one alert for training and one for validation."""
        found: list[Alert] = []
        said = False
        for prefix, where in _WHERE.items():
            gap, ece, count = (scalar(record, f"{prefix}calibration/{n}") for n in ("confidence_gap", "ece", "count"))
            if gap is None or ece is None or count is None or count < self.predictions:
                continue
            said = True
            if gap > self.gap and ece > self.ece:
                message = f"confidence exceeds accuracy, ECE {ece:.3g}, over {count:.0f} predictions"
                found.append(Alert(self.name, record.step, where, gap, self.gap, message))
        return found if said else None
