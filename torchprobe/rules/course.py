"""Rules about the course of a run as a whole: loss, total gradient, calibration, and what does not happen."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from torchprobe.records import ONE_CLASS, Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.base import LOSS_TAGS, BuiltIn, Found, Remembering, first_of, group, scalar, texts

_NORMS = ("overview/grad_norm_unclipped", "overview/grad_norm")  # a clipped norm says nothing: the first there is
_ROUNDING = 1e-6  # of the mean: what float32 losses of one and the same model differ by
_RUNNING = 4  # values in a row
_HIGH = 98  # percentile that each of them is above
_SMALL = 0.02  # of the largest value seen: at the end of learning, what is far out may be next to nothing
_TIMES = 4.0  # the window's largest: then one value is enough,
_LARGE = 0.2  # if it is above this share of the largest value seen


@dataclass(frozen=True)
class _Spike(Remembering):
    """Against the last `window` values of the same set of optimizers. Costs a sort of them where the mean is high."""

    deviations: float = 3.0
    window: int = 128
    least: int = 16

    what: ClassVar[str]

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Keeps windows, one for each tag and set of optimizers; a GAN's two losses are two series."""
        found = first_of(record, self.reads or ())
        if found is None:
            return None
        tag, value = found
        names = {name.partition("/")[0] for name, _ in group(record, "lr")}
        own = kept.setdefault("+".join([tag, *sorted(names)]), {})
        largest = own["largest"] = max(own.get("largest", 0.0), abs(value) if math.isfinite(value) else 0.0)
        past = _past(own, value, self.window + _RUNNING - 1)
        return self._sudden(record, value, past[-self.window :], largest) or self._lasting(
            record, [*past, value], largest
        )

    def _sudden(self, record: Record, value: float, window: list[float], largest: float) -> list[Alert]:
        far = self._suffices(window) and value > _TIMES * abs(window[-1])  # few are, and the maximum costs more
        limit = max(_TIMES * max(map(abs, window)), _LARGE * largest) if far else math.inf
        if not value > limit:
            return []
        message = f"{self.what} is over {_TIMES:g} times the largest of its last {len(window)} values"
        return [self.alert(record.step, None, value, limit, message)]

    def _lasting(self, record: Record, values: list[float], largest: float) -> list[Alert]:
        window, last = values[:-_RUNNING], values[-_RUNNING:]
        if not self._suffices(window) or sum(last) <= sum(window[-_RUNNING:]):  # cheaper than what is asked of a rise
            return []
        low, most = min(last), len(window) * (100 - _HIGH) / 100 + 1
        if len([past for past in window if past >= low]) > most:  # the percentile is no lower: cheaper than it, too
            return []
        mean = float(np.mean(window))
        limit = max(mean + self.deviations * max(float(np.std(window)), _ROUNDING * abs(mean)), _SMALL * largest)
        jump, spread = float(np.mean(last)) - float(np.mean(window[-_RUNNING:])), float(np.std(window))
        sudden = jump > self.deviations * spread  # a loss that drifts upwards, as a GAN's, has no spike
        if not float(np.mean(last)) > limit or not min(last) > np.percentile(window, _HIGH) or not sudden:
            return []
        message = (
            f"{self.what} has been high {_RUNNING} times running, its mean more than {self.deviations:g} standard "
            f"deviations above its last {len(window)} values"
        )
        return [self.alert(record.step, None, float(np.mean(last)), limit, message)]

    def _suffices(self, window: list[float]) -> bool:
        return len(window) >= min(self.least, self.window)


@dataclass(frozen=True)
class LossSpike(_Spike):
    """The loss is suddenly far above its last 128 values, or lastingly above them.

    Either 4 values in a row are above the 98th percentile of the last `window`, with a mean over `deviations` standard
    deviations above theirs and above that of its last four, and above 2 % of the largest seen; or one is above 4 times
    the window's largest and 20 % of the largest seen. A stricter form of OLMo-core's stability monitor. Silent until
    there are `least` values.

    The loss is `train/loss` or `loss`, as the user logs it, else `overview/loss`, what backward() was called on.
    """

    name = "loss_spike"
    reads = LOSS_TAGS
    what = "the loss"
    advice = (
        "One batch or a step that was too large has thrown the model back; many runs recover, some never do. If it "
        "does not come down, go back to a checkpoint before it and skip some hundred batches, and clip gradients or "
        "lower the learning rate (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1)."
    )


@dataclass(frozen=True)
class GradNormSpike(_Spike):
    """The total gradient norm, before clipping, is far above its last 128 sampled values; as `LossSpike`."""

    name = "grad_norm_spike"
    reads = _NORMS
    what = "the total gradient norm"
    advice = (
        "A few batches pull far harder than all others, which often comes just before the loss jumps. Clip the "
        "gradient norm, look at these batches, and lengthen the warm-up or lower the learning rate (Pascanu et al. "
        "2013, arXiv 1211.5063)."
    )


@dataclass(frozen=True)
class ExplodingGradient(Remembering):
    """The total norm is more than `factor` times the largest of the last `window` sampled values.

    Source: `is_unexpectedly_large` of Megatron-LM. Silent for the first `least` values, since gradients of a model that
    begins with zero weights grow by more than that in its first steps.
    """

    factor: float = 10.0
    window: int = 128
    least: int = 8

    name = "exploding_gradient"
    reads = _NORMS
    advice = (
        "Gradients grow from step to step until updates destroy the weights. Clip the gradient norm, lower the "
        "learning rate, and look for layers whose activations grow with depth or time (Pascanu et al. 2013, arXiv "
        "1211.5063)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        found = first_of(record, _NORMS)
        if found is None:
            return None
        tag, norm = found
        past = _past(kept if tag == _NORMS[0] else kept.setdefault(tag, {}), norm, self.window)
        limit = self.factor * max(past) if len(past) >= self.least else None
        if not limit or not norm > limit:
            return []
        message = f"the total gradient norm is over {self.factor:g} times the largest of the last {len(past)}"
        return [self.alert(record.step, None, norm, limit, message)]


@dataclass(frozen=True)
class Overconfidence(Remembering):
    """Confidence gap above `gap` and ECE above `ece`, over the last samples that hold at least `predictions`.

    Reads `calibration/confidence_gap`, `calibration/ece` and `calibration/count`, and averages them by count: for the
    gap that is exact, for the ECE an upper bound. Validation (`val/…`) has an alert of its own. Left alone: the first
    `untrained` steps of a run that trains, in which a model's confidence is that of its initialisation; and training
    whose targets are all of one class of two, among which confidence and accuracy differ in a calibrated model, too.
    """

    gap: float = 0.1
    ece: float = 0.1
    predictions: int = 1000
    untrained: int = 100

    name = "overconfidence"
    advice = (
        "The model is more often wrong than it says, so its probabilities cannot be used as they are. Try temperature"
        " scaling on held-out data, label smoothing, more regularisation or an earlier end of training (Guo et al. "
        "2017, arXiv 1706.04599)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Keeps the last samples, of training and of validation."""
        kept["trains"] = kept.get("trains") or bool(record.group("lr"))
        if kept["trains"] and record.step < self.untrained:
            kept.update({"": [], "val/": []})
            return None
        parts = [part for part in (("", None), ("val/", "val")) if f"{part[0]}calibration/count" in record.values]
        said = [alerts for part in parts if (alerts := self._judge(record, kept, *part)) is not None]
        return [alert for alerts in said for alert in alerts] if said else None

    def _judge(self, record: Record, kept: dict[str, Any], prefix: str, where: str | None) -> Found:
        """None when this record does not say, or when there are too few predictions; keeps rows that hold enough."""
        row = [scalar(record, f"{prefix}calibration/{name}") for name in ("count", "confidence_gap", "ece")]
        if None in row or (where is None and ONE_CLASS in record.evidence):
            return None
        rows = [*kept.get(prefix, []), row]
        enough = int(np.searchsorted(np.cumsum([one[0] for one in reversed(rows)]), self.predictions)) + 1
        rows = kept[prefix] = rows[-enough:]
        counts, gaps, errors = np.array(rows, np.float64).T
        count = float(counts.sum())
        if count < self.predictions:
            return None
        gap, ece = (float((counts * values).sum()) / count for values in (gaps, errors))
        message = f"confidence exceeds accuracy, ECE {ece:.3g}, over {count:.0f} predictions"
        ill = gap > self.gap and ece > self.ece
        return [self.alert(record.step, where, gap, self.gap, message)] if ill else []


@dataclass(frozen=True)
class NothingCaptured(BuiltIn):
    """A requested probe saw nothing in its first three sampled steps; the message says which and why.

    Reads the texts `nothing_captured/<Probe>`. Of the default probes, one that a model need not have anything for
    (attention, say) is not reported.
    """

    name = "nothing_captured"
    patience = sys.maxsize  # it does not end
    reads = ("nothing_captured/",)
    advice = (
        "What the probe looks for does not happen in this model in a form that it sees, so its tags stay empty. Leave"
        " the probe out, or bring the model into a form that is seen (torchprobe, docs/setups.md and "
        "docs/attention.md)."
    )

    def __call__(self, record: Record) -> Found:
        """What holds in this record."""
        found = texts(record, "nothing_captured")
        return [self.alert(record.step, probe, 0.0, None, why) for probe, why in found] or None


def _past(kept: dict[str, Any], value: float, size: int) -> list[float]:
    """The last values before this one, which is kept with them unless it is NaN or inf."""
    past: list[float] = kept.get("values", [])[-size:]
    kept["values"] = [*past, value][-size:] if math.isfinite(value) else past
    return past
