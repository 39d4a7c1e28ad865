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
