"""Rules about how much arrives where: gradients of layers that vanish, and steps of parameters out of proportion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchprobe.naming import owner_of
from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.base import BuiltIn, Found, Memory, group, loss_of, not_finite, scalar

_CONVERGED = 1e-3  # of the largest loss
_NEGLIGIBLE = 1e-2  # of the norm of all parameters


@dataclass(frozen=True)
class VanishingGradient(BuiltIn):
    """A layer's mean absolute gradient is below `threshold`: one alert a layer. Source: SageMaker Debugger.

    Healthy, and left alone: all layers below it when the loss has fallen below a thousandth of its largest (nothing is
    left to learn); a gradient of exactly zero at step 1 (weights that begin at zero, as in LoRA). Frozen layers have
    no gradient and no tag.
    """

    threshold: float = 1e-7

    name = "vanishing_gradient"

    def watcher(self) -> Memory:
        """Keeps the largest loss, by which a converged model is known."""
        return Memory(self._look)

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        converged = _has_converged(record, kept)
        layers = dict(group(record, "grad_mean_abs"))
        if not layers or not_finite(record):
            return None
        low = {layer: mean for layer, mean in layers.items() if mean < self.threshold and (mean or record.step > 1)}
        if converged and len(low) == len(layers):
            return []
        message = "hardly any gradient arrives: the mean absolute gradient of the layer is below the threshold"
        return [Alert(self.name, record.step, layer, mean, self.threshold, message) for layer, mean in low.items()]


@dataclass(frozen=True)
class UpdateRatio(BuiltIn):
    """A step's norm over the parameter's is above `high` or below `low`. Source: SageMaker Debugger.

    Healthy, and left alone: a small ratio because the learning rate is 0 or small beside the largest seen (warm-up,
    the end of a schedule: the ratio is compared as if the rate were the largest); one parameter of a module that
    stands still while others move (a bias in front of BatchNorm has no gradient); a frozen one; no movement at step 1
    without a gradient (behind weights that begin at zero, as in LoRA); a large ratio of a parameter whose norm is
    still under 1 % of the model's (a bias that passes through zero).
    """

    high: float = 10.0
    low: float = 1e-8

    name = "update_ratio"

    def watcher(self) -> Memory:
        """Keeps the largest learning rate, beside which a small one explains a small step."""
        return Memory(self._look)

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        pace = _pace(record, kept)
        ratios = dict(group(record, "update_ratio"))
        if not ratios or not_finite(record):
            return None
        return [*self._too_large(record, ratios), *(self._too_small(record, ratios, pace) if pace else ())]

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


def _has_converged(record: Record, kept: dict[str, Any]) -> bool:
    """Whether the loss is far below the largest seen."""
    found = loss_of(record)
    if found is None or not math.isfinite(found[1]):
        return False
    loss = abs(found[1])
    kept["largest_loss"] = max(kept.get("largest_loss", 0.0), loss)
    return bool(loss < _CONVERGED * kept["largest_loss"])


def _pace(record: Record, kept: dict[str, Any]) -> float:
    """The learning rate over the largest seen; 1 when it is not recorded."""
    rates = [rate for _, rate in group(record, "lr")]
    if not rates:
        return 1.0
    kept["largest_rate"] = largest = float(max(kept.get("largest_rate", 0.0), *rates))
    return max(rates) / largest if largest > 0 else 0.0
