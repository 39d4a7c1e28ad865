"""Rules about single layers: gradients and updates out of proportion, attention, and units that are dead."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchprobe.naming import layer_of, owner_of
from torchprobe.records import Record
from torchprobe.rules.base import LOSS_TAGS, BuiltIn, Found, Remembering, first_of, group, not_finite, scalar

_CONVERGED = 1e-3  # of the largest loss
_NEGLIGIBLE = 1e-2  # of the norm of all parameters
_STANDING = 1e-4  # of the largest learning rate: at a smaller one nothing has to move
_GROWING = 1e-2  # of its norm, a step: a weight that began at zero is still about to leave it

_AT_REST = 100.0  # times the threshold: no layer of a converged model has more


@dataclass(frozen=True)
class VanishingGradient(Remembering):
    """The mean absolute gradient of layers is below `threshold`. Source: SageMaker Debugger.

    Healthy, and left alone: layers below it when the loss has fallen below a thousandth of its largest and the
    gradients of all layers are small (nothing is left to learn); a gradient of exactly zero while nothing has moved
    yet, or behind a weight that is zero and about to move (as in LoRA, under any warm-up), and a small one while that
    weight still grows by over a hundredth a step. Frozen layers have no gradient and no tag.
    """

    threshold: float = 1e-7

    name = "vanishing_gradient"
    advice = (
        "Next to nothing reaches these layers, so they do not learn. Try residual connections, normalisation, an "
        "initialisation that fits the activation, or ReLU-like units in place of saturating ones (Glorot & Bengio "
        "2010; He et al. 2015, arXiv 1512.03385)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Keeps the largest loss, by which a converged model is known, and whether anything has moved."""
        rests, begins = _is_at_rest(record, kept, self.threshold), _begins(record, kept)
        layers = dict(group(record, "grad_mean_abs"))
        if not layers or not_finite(record):
            return None
        emerging = _emerging(record, kept)
        low = {layer: mean for layer, mean in layers.items() if mean < self.threshold and (mean or not begins)}
        low = {layer: mean for layer, mean in low.items() if not (mean and layer in emerging)}
        learn = {layer_of(part) for part in layers if part not in low}
        low = {layer: mean for layer, mean in low.items() if layer not in learn}
        if rests:
            return []
        message = "hardly any gradient arrives: the mean absolute gradient is below the threshold"
        return self.together(record.step, low, self.threshold, message)


@dataclass(frozen=True)
class UpdateRatio(Remembering):
    """A step's norm over the parameter's is above `high` or below `low`. Source: SageMaker Debugger.

    Healthy, and left alone: a small ratio because the learning rate is 0 or small beside the largest seen (warm-up,
    the end of a schedule: the ratio is compared as if the rate were the largest); one parameter of a module that
    stands still while others move (a bias in front of BatchNorm has no gradient); a frozen one; no movement without a
    gradient while nothing has moved yet, or behind a weight that is zero or still grows out of it (as in LoRA), or in a
    converged model (LBFGS stops there); a large ratio at step 1, or of a parameter whose norm is still under 1 % of the
    model's (a bias that passes through zero).
    """

    high: float = 10.0
    low: float = 1e-8

    name = "update_ratio"
    advice = (
        "A healthy step moves a parameter by about a thousandth of its norm: far more throws away what was learnt, "
        "far less learns nothing. Lower or raise the learning rate of this parameter group, and see whether its "
        "gradient is clipped, scaled or detached (Stanford CS231n, Neural Networks 3: ratio of weights to updates)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Keeps the largest learning rate, beside which a small one explains a small step, and what has moved."""
        pace, begins = _pace(record, kept), _begins(record, kept)
        ratios = dict(group(record, "update_ratio"))
        if not ratios or not_finite(record):
            return None
        rests = _is_at_rest(record, kept, VanishingGradient.threshold)
        large = self._too_large(record, ratios) if record.step > 1 else {}
        emerging = _emerging(record, kept)
        small = self._too_small(record, ratios, pace, begins) if pace > _STANDING and not rests else {}
        small = {name: ratio for name, ratio in small.items() if not (ratio and owner_of(name) in emerging)}
        too_much = "one step moved the parameter by many times its own norm"
        too_little = "the step hardly moved the parameter, nor the others of its module"
        return [
            *self.together(record.step, large, self.high, too_much),
            *self.together(record.step, small, self.low, too_little),
        ]

    def _too_large(self, record: Record, ratios: Mapping[str, float]) -> dict[str, float]:
        least = _NEGLIGIBLE * (scalar(record, "overview/param_norm") or 0.0)
        norms = {name: scalar(record, f"param_norm/{name}") for name in ratios}
        large = {name: ratio for name, ratio in ratios.items() if ratio > self.high}
        return {name: ratio for name, ratio in large.items() if (norm := norms[name]) is None or not norm < least}

    def _too_small(self, record: Record, ratios: Mapping[str, float], pace: float, begins: bool) -> dict[str, float]:
        modules: defaultdict[str, list[float]] = defaultdict(list)
        for name, ratio in ratios.items():
            modules[layer_of(owner_of(name))].append(ratio)
        gradients = dict(group(record, "grad_norm"))
        return {
            name: ratio
            for name, ratio in ratios.items()
            if max(modules[layer_of(owner_of(name))]) < self.low * pace
            and not (gradients and name not in gradients)  # frozen
            and not (begins and gradients.get(name) == 0)
        }


@dataclass(frozen=True)
class _Threshold(BuiltIn):
    """One alert for all modules whose number under what it reads, `<group>/<module>`, is above the threshold."""

    threshold: float

    message: ClassVar[str]

    def __call__(self, record: Record) -> Found:
        values = {where: value for name in self.reads or () for where, value in group(record, name)}
        if not values:
            return None
        ill = {module: value for module, value in values.items() if self._holds(record, module, value)}
        return self.together(record.step, ill, self.threshold, self.message)

    def _holds(self, record: Record, module: str, value: float) -> bool:
        return value > self.threshold


@dataclass(frozen=True)
class AttentionCollapse(_Threshold):
    """A head's mean entropy is below `threshold` nats; the value is the entropy of a module's lowest head.

    Source: Zhai et al. 2023 on entropy collapse. Attention in which every query sees one key only has no entropy to
    lose and is left alone.
    """

    threshold: float = 0.1

    name = "attention_collapse"
    reads = ("attention_entropy_min/",)
    message = "a head attends to hardly more than one key: its mean entropy in nats is below the threshold"
    advice = (
        "A head that looks at one key passes hardly any gradient to queries and keys, and training often turns "
        "unstable soon after. Try a lower learning rate, a longer warm-up, or normalised queries and keys (Zhai et "
        "al. 2023, arXiv 2303.06296)."
    )

    def _holds(self, record: Record, module: str, value: float) -> bool:
        return value < self.threshold and scalar(record, f"attention_entropy_normalized/{module}") is not None


@dataclass(frozen=True)
class AttentionLogitGrowth(_Threshold):
    """The largest signed logit of an attention, after scale and mask, is above `threshold` (the default of QK-clip)."""

    threshold: float = 100.0

    name = "attention_logit_growth"
    reads = ("attention_max_logit/",)
    message = "the largest attention logit is above the threshold: the softmax saturates"
    advice = (
        "Logits of this size make the softmax one-hot, and in half precision they soon overflow. Try normalised "
        "queries and keys or QK-clip, a lower learning rate, or weight decay on the query and key projections "
        "(Dehghani et al. 2023, arXiv 2302.05442; Kimi K2 2025, arXiv 2507.20534)."
    )


@dataclass(frozen=True)
class DeadUnits(Remembering):
    """More than `threshold` of the units behind a ReLU are active on under 1 % of inputs, `samples` samples running.

    It ends below four fifths of the threshold. Source: SageMaker Debugger. Reads `dead_units/<module>` of the
    `UnitActivity` probe.
    """

    threshold: float = 0.5
    samples: int = 3

    name = "dead_units"
    reads = ("dead_units/",)
    advice = (
        "A unit that is never active has no gradient and does not come back by itself, so the layer is narrower than "
        "it looks. Try a lower learning rate, He initialisation with small positive biases, or a leaky unit such as "
        "LeakyReLU or GELU (Lu et al. 2019, arXiv 1903.06733)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Keeps in how many samples running each layer was dead."""
        shares = dict(group(record, "dead_units"))
        for module, share in shares.items():
            held = kept.get(module, 0)
            limit = self.threshold if held < self.samples else 0.8 * self.threshold
            kept[module] = min(held + 1, self.samples) if share > limit else 0
        if not shares:
            return None
        ill = {module: share for module, share in shares.items() if kept[module] >= self.samples}
        message = "units of the layer are active on under 1 % of inputs: a larger share than the threshold"
        return self.together(record.step, ill, self.threshold, message)


def _is_at_rest(record: Record, kept: dict[str, Any], small: float) -> bool:
    """Whether the model has converged: the loss is far below the largest seen, and all layers' gradients are small."""
    found = first_of(record, LOSS_TAGS)
    if found is None or not math.isfinite(found[1]):
        return False
    loss = abs(found[1])
    kept["largest_loss"] = max(kept.get("largest_loss", 0.0), loss)
    if loss >= _CONVERGED * kept["largest_loss"]:
        return False
    means = [mean for _, mean in group(record, "grad_mean_abs")]
    return bool(means) and max(means) < _AT_REST * small


def _pace(record: Record, kept: dict[str, Any]) -> float:
    """The learning rate over the largest seen; 1 when it is not recorded."""
    rates = [rate for _, rate in group(record, "lr")]
    if not rates:
        return 1.0
    kept["largest_rate"] = largest = float(max(kept.get("largest_rate", 0.0), *rates))
    return max(rates) / largest if largest > 0 else 0.0


def _emerging(record: Record, kept: dict[str, Any]) -> list[str]:
    """Modules that had no gradient at all at the first sample, while the largest of the weights that were zero before
    it, and hid them, still grows.
    """
    gradients, norms, ratios = (dict(group(record, name)) for name in ("grad_norm", "param_norm", "update_ratio"))
    if not (gradients and norms and ratios):
        return []
    if "hidden" not in kept:
        kept["grows"] = [name for name, norm in gradients.items() if norm and name in norms and name not in ratios]
        reached = {owner_of(name) for name, norm in gradients.items() if norm and name not in kept["grows"]}
        kept["hidden"] = sorted({owner_of(name) for name, norm in gradients.items() if not norm} - reached)
    largest = max(kept["grows"], key=lambda name: norms.get(name, 0.0), default=None)
    return kept["hidden"] if largest is not None and ratios.get(largest, 1.0) > _GROWING else []


def _begins(record: Record, kept: dict[str, Any]) -> bool:
    """Whether a gradient of exactly zero is how a model begins.

    So it is at step 1, until an earlier step had a learning rate above 0, where parameters are seen for the first time
    (a second optimizer's), and while one that was still zero at its last sample had a gradient there or has one now: a
    weight of zero hides what stands before it.
    """
    seen: dict[str, int] = kept.setdefault("seen", {})  # 1: zero, 2: and with a gradient
    norms = dict(group(record, "param_norm"))
    gradients = dict(group(record, "grad_norm")) if norms else {}
    begins = record.step == 1 or not kept.get("moved", True)
    for name in norms or seen:
        last = seen.get(name, 2 if seen else 0)
        begins |= last > 1 or (last > 0 and gradients.get(name, 0) > 0)
    if not kept.get("moved"):
        rates = [rate for _, rate in group(record, "lr")]
        if rates or record.step > 1:
            kept["moved"] = kept.get("moved", record.step > 1) or not rates or max(rates) > 0
    for name, norm in norms.items():
        seen[name] = 0 if norm else 1 + (gradients.get(name, 0) > 0)
    return begins
