"""Runs that learn nothing: labels and batches without information, rates far too high or low, weights that decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchprobe.records import EVIDENCE, Record
from torchprobe.rules.base import LOSS_TAGS, Diagnosis, Found, evidence, first_of, group, scalar

_MOST_KEPT = 1024  # losses; beyond it every second one is dropped
_ABOVE = 1.05  # times the entropy
_SORTED = 1.5  # times the share of pairs of one class in the run: a batch that was not shuffled,
_BATCH = 8  # of so many and more
_CLIPPED = 100.0  # times smaller than it was: clipping has left nothing of a gradient
_EQUAL = 0.02  # of the loss: what is called on backward is the cross-entropy, and nothing else


@dataclass(frozen=True)
class AtChance(Diagnosis):
    """Cross-entropy is hardly better than the entropy of the targets seen, which always guessing frequencies costs.

    The mean of the last quarter of at least `steps` losses is above `share` of that entropy, and does not fall. Left
    alone: a loss that was far above it and has just come down to it, since frequencies are what is learnt first.
    """

    steps: int = 150
    share: float = 0.9
    targets: int = 10

    name = "at_chance"
    reads = (EVIDENCE, "overview/loss")
    message = "the loss is hardly better than always guessing how often each class occurs: next to nothing is learnt"
    advice = (
        "Check that labels belong to their inputs (shuffled apart, off by one), that the learning rate is neither far "
        "too high nor too low; and that a few examples alone can be fitted (Karpathy 2019, A recipe for training "
        "neural networks: overfit one batch)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Every tenth loss is judged, by the targets of the last sample."""
        loss = scalar(record, "overview/loss")
        if record.evidence:
            self._learn(record, kept, loss)
        if loss is None or not math.isfinite(loss):
            return None
        losses = _keep(kept, record.step, loss)
        if record.step % 10 or not kept.get("plain") or record.step < self.steps or len(losses) < 8:
            return None
        quarter = len(losses) // 4
        last, before = float(np.mean(losses[-quarter:])), float(np.mean(losses[-2 * quarter : -quarter]))
        limit = self.share * kept["entropy"]
        stays = last > min(0.98 * before, float(np.mean(losses[:4])))
        ill = last > limit > 0.05 and stays and not _is_new(losses, kept["entropy"])
        return [self.alert(record.step, None, last, limit, self.message)] if ill else []

    def _learn(self, record: Record, kept: dict[str, Any], loss: float | None) -> None:
        """plain: all samples so far had the plain cross-entropy for their loss, and targets enough."""
        facts = ("target_entropy", "cross_entropy", "counted", "targets", "classes", "classes_unseen")
        entropy, nll, counted, seen, classes, unseen = (record.evidence.get(fact, math.nan) for fact in facts)
        if math.isnan(nll):
            return
        equal = loss is not None and min(abs(loss - nll), abs(loss - counted * nll)) <= _EQUAL * abs(nll) + 1e-3
        kept["equal"] = kept.get("equal", True) and equal
        kept["plain"] = kept["equal"] and seen >= self.targets * max(1.0, classes - unseen)
        kept["entropy"] = entropy


@dataclass(frozen=True)
class ClassNeverOccurs(Diagnosis):
    """Classes of the output that no target is of, where 20 targets a class were seen, and 3 of each that occurs.

    Left alone: batches of few classes while the run has several, since others are to come in turn.
    """

    targets: int = 20

    name = "class_never_occurs"
    serious = False
    fact = "classes_unseen"
    message = "so many classes of the output were never a target: labels may be off by one, or the output too wide"
    advice = (
        "Compare the smallest and largest label with the width of the last layer; labels count from 0 (PyTorch, "
        "torch.nn.CrossEntropyLoss)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        unseen, seen, classes = (evidence(record, f).get("", 0.0) for f in (self.fact, "targets", "classes"))
        now, run, size = (evidence(record, f).get("", 0.0) for f in ("same_class", "same_class_in_all", "batch"))
        kept["sorted"] = kept.get("sorted") or (size >= _BATCH and now > max(0.5, _SORTED * run))
        enough = (
            not kept["sorted"]
            and classes > 1
            and seen >= self.targets * classes
            and not evidence(record, "classes_rare").get("")
        )
        return self.said(record.step, {"": unseen} if enough and unseen else {})


@dataclass(frozen=True)
class UnshuffledBatches(Diagnosis):
    """Batches are nearly of one class each, while the run has several: data sorted by label, and not shuffled."""

    share: float = 0.9
    batch: int = _BATCH

    name = "unshuffled_batches"
    message = "batches hold hardly more than one class each, though the data have several: they are not shuffled"
    advice = (
        "Each step learns one class and forgets the others. Pass `shuffle=True` to the DataLoader, or permute the data "
        "before they are split into batches (Bengio 2012, "
        "arXiv 1206.5533, section 3.1.1)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        now, run, size = (evidence(record, f).get("", math.nan) for f in ("same_class", "same_class_in_all", "batch"))
        if math.isnan(now):
            return None
        kept["sorted"] = kept.get("sorted", 0) + 1 if now >= self.share and size >= self.batch else 0
        ill = kept["sorted"] >= self.samples and run < 0.75
        return [self.alert(record.step, None, now, self.share, self.message)] if ill else []


@dataclass(frozen=True)
class LearningRateTooHigh(Diagnosis):
    """After step 1 `samples` steps moved parameters by over `ratio` of their norm: in samples, or, but for one of them,
    between two samples by how the norm has grown; and the last `steps` losses are all above `rise` times the first.
    Left alone: large steps that the loss survives, a first loss of 0 or below.
    """

    samples: int = 2
    ratio: float = 0.1
    rise: float = 3.0
    steps: int = 10

    name = "learning_rate_too_high"
    reads = (EVIDENCE, *LOSS_TAGS)
    message = "steps move parameters by much of their norm, and the loss has leapt up and stays there"
    advice = (
        "The learning rate is too high: a healthy step moves a parameter by about a thousandth of its norm. Lower it "
        "by factors of 10 until the loss falls, and warm it up (Stanford CS231n, Neural Networks 3: ratio of weights "
        "to updates)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        loss, ratio = first_of(record, LOSS_TAGS), scalar(record, "overview/update_ratio")
        if loss is not None:
            first = kept.setdefault("first", loss[1])
            kept["above"] = kept.get("above", 0) + 1 if loss[1] > self.rise * first > 0 else 0
        large = (record.step > 1 and ratio is not None and ratio > self.ratio) or self._grown(record, kept)
        kept["large"] = kept.get("large", 0) + large
        ill = kept["large"] >= self.samples and kept.get("above", 0) >= self.steps
        if ill:
            return [self.alert(record.step, None, kept["large"], None, self.message)]
        return None if ratio is None else []

    def _grown(self, record: Record, kept: dict[str, Any]) -> int:
        """The steps since the last sample but one, which may be a leap, if each has grown the norm by over `ratio`."""
        if not (found := group(record, "param_norm")):
            return 0
        norms, past = dict(found), kept.setdefault("norms", {})
        last = {name: past[name] for name in norms if name in past}
        past.update({name: (record.step, norm) for name, norm in norms.items()})
        steps = record.step - max((step for step, _ in last.values()), default=record.step)
        same = [name for name, (step, _) in last.items() if step == record.step - steps]
        before, norm = math.hypot(*(last[name][1] for name in same)), math.hypot(*(norms[name] for name in same))
        return max(steps - 1, 0) if 0 < before * (1 + self.ratio) ** min(steps, 100) < norm < math.inf else 0


@dataclass(frozen=True)
class LearningRateTooLow(Diagnosis):
    """A full step moves parameters by under `ratio` of their norm, and the loss stays what it was. Those that do not
    move at all are slow only where the rate itself is under `ratio`; else they get no gradient. So are those that would
    move by less at a rate of 1, too: then gradients vanish.
    """

    steps: int = 100
    ratio: float = 1e-5

    name = "learning_rate_too_low"
    reads = (EVIDENCE, *LOSS_TAGS)
    message = "steps move parameters by next to nothing, and the loss hardly falls: the learning rate is too low"
    advice = (
        "A healthy step moves a parameter by about a thousandth of its norm. Raise the learning rate by factors of 10 "
        "until the loss moves (Stanford CS231n, Neural Networks 3: ratio of weights to updates)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        found = first_of(record, LOSS_TAGS)
        losses = _keep(kept, record.step, found[1]) if found else kept.get("losses", [])
        ratio, rates = scalar(record, "overview/update_ratio"), record.evidence and evidence(record, "rate").values()
        if ratio is None or not rates:
            return None
        kept["rate"] = largest = max(*rates, kept.get("rate", 0.0))
        full = max(rates) > 0.5 * largest > 0
        if record.step < self.steps or len(losses) < 8 or not full:
            return []
        quarter = len(losses) // 4
        flat = np.mean(losses[-quarter:]) > 0.95 * np.mean(losses[:quarter]) > 0
        slow = largest * self.ratio < ratio < self.ratio or (ratio == 0 and largest < self.ratio)
        norms = [scalar(record, f"overview/grad_norm{kind}") or 0.0 for kind in ("", "_unclipped")]
        clipped = f", or gradients are clipped too far, from {norms[1]:.3g} to {norms[0]:.3g}"
        message = self.message + (clipped if norms[0] * _CLIPPED < norms[1] else "")
        return [self.alert(record.step, None, ratio, self.ratio, message)] if slow and flat else []


@dataclass(frozen=True)
class WeightDecayTooLarge(Diagnosis):
    """With weight decay the norm of the parameters that stepped has fallen below `share` of what it was when each was
    first sampled, and the loss hardly has since any of them was.
    """

    share: float = 0.5

    name = "weight_decay_too_large"
    message = "weight decay shrinks the weights faster than the gradient builds them up: their norm has halved"
    advice = (
        "Weights are pulled to zero faster than they learn. Lower `weight_decay`; usual are 1e-5 to 5e-4 with SGD and "
        "0.01 to 0.1 with AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        norms, loss = dict(group(record, "param_norm")), first_of(record, LOSS_TAGS)
        decay = max(evidence(record, "decay").values(), default=0.0)
        if not norms or loss is None:
            return None
        began = [kept.setdefault("began", {}).setdefault(name, (norm, loss[1])) for name, norm in norms.items()]
        norm, first = math.hypot(*norms.values()), math.hypot(*(norm for norm, _ in began))
        ill = decay > 0 and norm < self.share * first and loss[1] > 0.7 * max(loss for _, loss in began) > 0
        return [self.alert(record.step, None, norm, self.share * first, self.message)] if ill else []


def _is_new(losses: list[float], entropy: float) -> bool:
    """Whether the loss has come down to the entropy only in the last two thirds: frequencies are what is learnt first.

    A loss that never came down is not new there.
    """
    started = losses[0] > _ABOVE * entropy
    down = next((i for i in range(8, len(losses)) if np.mean(losses[i - 8 : i]) <= _ABOVE * entropy), 0)
    return started and down > len(losses) / 3


def _keep(kept: dict[str, Any], step: int, loss: float) -> list[float]:
    """The losses so far, of every n-th step."""
    stride = kept.setdefault("stride", 1)
    losses: list[float] = kept.setdefault("losses", [])
    if step % stride == 0 and math.isfinite(loss):
        losses.append(loss)
    if len(losses) > _MOST_KEPT:
        kept["losses"], kept["stride"] = losses[1::2], 2 * stride
    return kept["losses"]  # type: ignore[no-any-return]
