"""Units that are never active."""

from __future__ import annotations

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found, group, positive


class DeadUnits:
    """More than `threshold` of the units behind a ReLU are active on under 1 % of inputs. Source: SageMaker Debugger.

    Reads `dead_units/<module>` of the `UnitActivity` probe.
    """

    name = "dead_units"

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = positive("threshold", threshold)

    def __call__(self, record: Record) -> Found:
        """One alert a module."""
        shares = dict(group(record, "dead_units"))
        if not shares:
            return None
        message = "units of the layer are active on under 1 % of inputs: a larger share than the threshold"
        return [
            Alert(self.name, record.step, module, share, self.threshold, message)
            for module, share in shares.items()
            if share > self.threshold
        ]
