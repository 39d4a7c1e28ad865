"""Rules that compare a value with its recent past: spikes of the loss and of the gradient, and its explosion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.base import LOSS_TAGS, BuiltIn, Found, Memory, loss_of, scalar

_NORM = "overview/grad_norm"
_ROUNDING = 1e-6  # of the mean: what float32 losses of one and the same model differ by


@dataclass(frozen=True)
class _Spike(BuiltIn):
    """More than `deviations` standard deviations above the last `window` values. Costs a pass over them for each."""

    deviations: float = 6.0
    window: int = 128

    tags: ClassVar[tuple[str, ...]]
    what: ClassVar[str]

    def watcher(self) -> Memory:
        """With empty windows, one for each tag."""
        return Memory(self._look)

    def _look(self, record: Record, windows: dict[str, Any]) -> Found:
        found = loss_of(record, self.tags)
        if found is None:
            return None
        tag, value = found
        past = _past(windows.setdefault(tag, {}), value, self.window)
        limit = _limit(past, self.deviations) if len(past) == self.window else None
        if limit is None or not value > limit:
            return []
        message = (
            f"{self.what} is more than {self.deviations:g} standard deviations above its last {self.window} values"
        )
        return [Alert(self.name, record.step, None, value, limit, message)]


@dataclass(frozen=True)
class LossSpike(_Spike):
    """The loss is over 6 standard deviations above the mean of its last 128 values (OLMo-core's stability monitor).

    The loss is `train/loss` or `loss`, as the user logs it, else `overview/loss`, what backward() was called on. Silent
    until there are 128 values.
    """

    name = "loss_spike"
    tags = LOSS_TAGS
    what = "the loss"


@dataclass(frozen=True)
class GradNormSpike(_Spike):
    """The total gradient norm is over 6 standard deviations above the mean of its last 128 sampled values.

    Source: the stability monitor of OLMo-core. Silent until there are 128 values.
    """

    name = "grad_norm_spike"
    tags = (_NORM,)
    what = "the total gradient norm"


@dataclass(frozen=True)
class ExplodingGradient(BuiltIn):
    """The total norm is more than `factor` times the largest of the last `window` sampled values.

    Source: `is_unexpectedly_large` of Megatron-LM. Silent for the first `least` values, since gradients of a model that
    begins with zero weights grow by more than that in its first steps.
    """

    factor: float = 10.0
    window: int = 128
    least: int = 8

    name = "exploding_gradient"

    def watcher(self) -> Memory:
        """With an empty window."""
        return Memory(self._look)

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        norm = scalar(record, _NORM)
        if norm is None:
            return None
        past = _past(kept, norm, self.window)
        limit = self.factor * max(past) if len(past) >= self.least else None
        if not limit or not norm > limit:
            return []
        message = f"the total gradient norm is over {self.factor:g} times the largest of the last {len(kept['values'])}"
        return [Alert(self.name, record.step, None, norm, limit, message)]


def _past(kept: dict[str, Any], value: float, size: int) -> list[float]:
    """The last values before this one, which is kept with them unless it is NaN or inf."""
    past: list[float] = kept.get("values", [])[-size:]
    kept["values"] = [*past, value][-size:] if math.isfinite(value) else past
    return past


def _limit(values: list[float], deviations: float) -> float:
    """So many standard deviations above the mean; a constant series allows for rounding."""
    mean = fmean(values)
    variance = fmean((value - mean) ** 2 for value in values)
    return mean + deviations * max(math.sqrt(variance), _ROUNDING * abs(mean))


@dataclass(frozen=True)
class Overfitting(BuiltIn):
    """The validation loss is more than `rise` of itself above its smallest while the training loss has fallen since, in
    `patience` validations running.

    Source: early stopping by generalisation loss over successive validations (Prechelt 1998, GL and UP); 20 % is far
    beyond the noise of a validation, GL of 20. The losses are `val/loss` and the training loss, as the user logs them,
    else `val/calibration/nll` and `calibration/nll`. Training losses are averaged between validations.
    """

    rise: float = 0.2
    patience: int = 3

    name = "overfitting"

    def watcher(self) -> Memory:
        """That has seen no validation."""
        return Memory(self._look)

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        found: Found = None
        for tag, training in (("val/loss", LOSS_TAGS), ("val/calibration/nll", ("calibration/nll",))):
            own = kept.setdefault(tag, {"sum": 0.0, "count": 0, "run": 0})
            trained, loss = loss_of(record, training), scalar(record, tag)
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
        if own["run"] < self.patience:
            return []
        message = f"the validation loss is far above its smallest, {own['best']:.4g}, while the training loss falls"
        return [Alert(self.name, step, "val", loss, limit, message)]
