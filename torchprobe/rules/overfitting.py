"""Whether validation gets worse while training gets better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.base import LOSS_TAGS, BuiltIn, Found, Memory, first_of, scalar


@dataclass(frozen=True)
class Overfitting(BuiltIn):
    """The validation loss is more than `rise` of itself above its smallest while the training loss has fallen since, in
    `validations` running.

    Source: early stopping by generalisation loss over successive validations (Prechelt 1998, GL and UP); 20 % is far
    beyond the noise of a validation, GL of 20. The losses are `val/loss` and the training loss, as the user logs them,
    else `val/calibration/nll` and `calibration/nll`. Training losses are averaged between validations.
    """

    rise: float = 0.2
    validations: int = 3

    name = "overfitting"
    patience = 1  # a validation is a judgement by itself
    advice = (
        "What the model still learns holds for its training data alone. Go back to the checkpoint of the smallest "
        "validation loss, and try more data or augmentation, weight decay or dropout, or a smaller model (Prechelt "
        "1998, Early Stopping - But When?)."
    )

    def watcher(self) -> Memory:
        """That has seen no validation."""
        return Memory(self._look)

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        found: Found = None
        for tag, training in (("val/loss", LOSS_TAGS), ("val/calibration/nll", ("calibration/nll",))):
            own = kept.setdefault(tag, {"sum": 0.0, "count": 0, "run": 0})
            trained, loss = first_of(record, training), scalar(record, tag)
            if trained is not None:
                own["sum"], own["count"] = own["sum"] + trained[1], own["count"] + 1
            if loss is not None and own["count"] and found is None:
                found = self._judge(record.step, loss, own)
        return found

    def _judge(self, step: int, loss: float, own: dict[str, Any]) -> list[Alert]:
        mean = own["sum"] / own["count"]
        own["sum"], own["count"] = 0.0, 0
        if "best" not in own or loss < own["best"]:
            own["best"], own["trained"], own["run"] = loss, mean, 0
            return []
        limit = own["best"] + self.rise * abs(own["best"])
        own["run"] = own["run"] + 1 if loss > limit and mean < own["trained"] else 0
        if own["run"] < self.validations:
            return []
        message = f"the validation loss is far above its smallest, {own['best']:.4g}, while the training loss falls"
        return [self.alert(step, "val", loss, limit, message)]
