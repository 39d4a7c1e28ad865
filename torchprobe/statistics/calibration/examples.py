"""One prediction against its target, for a portion of examples at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IMPOSSIBLE = 2.0**-126
"""A probability below this counts as this, the smallest normal float32: one example then adds 87.3 nats, not inf."""

_LEAST = math.log(IMPOSSIBLE)
_SLACK = 0.05  # by how much a distribution in a narrow type may miss 1


class Judged(NamedTuple):
    """Examples, (n,) each; what is not `valid` holds anything."""

    confidence: Tensor
    """The largest probability."""
    correct: Tensor
    brier: Tensor
    nll: Tensor
    valid: Tensor
    score: Tensor | None
    """The probability of class 1 of two."""
    positive: Tensor | None


def judge_classes(predictions: Tensor, target: Tensor, from_logits: bool, favourite: Tensor | None = None) -> Judged:
    """predictions: (n, classes). target: (n,), class numbers. favourite: (n,), the likeliest classes, when known."""
    named = target.clamp(0, predictions.size(-1) - 1).long()
    predicted = predictions.max(dim=-1).indices if favourite is None else favourite  # argmax takes longer
    top = predictions.gather(-1, predicted[:, None])[:, 0]
    read = _of_logits if from_logits else _of_probabilities
    weight, total, nll, valid = read(predictions, top, named[:, None])
    squares = (torch.linalg.vector_norm(weight, dim=-1) / total).square()
    brier = (squares - 2 * (-nll).exp() + 1).clamp(min=0)
    confidence = weight.gather(-1, predicted[:, None])[:, 0] / total
    two = (weight[:, 1] / total, named == 1) if weight.size(-1) == 2 else (None, None)
    return Judged(confidence, predicted == named, brier, _bounded(nll), valid & (target == named), *two)


def _of_logits(logits: Tensor, top: Tensor, named: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unnormalized probabilities and their sum, NLL, and which are valid: one pass with an exponential."""
    weight = logits - top[:, None]
    log = weight.gather(-1, named)[:, 0]
    total = weight.exp_().sum(dim=-1)
    return weight, total, total.log() - log, total.isfinite()  # not with a NaN, a +inf, or nothing but -inf


def _of_probabilities(probability: Tensor, top: Tensor, named: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of what is normalized already."""
    nll = -probability.gather(-1, named)[:, 0].clamp(min=IMPOSSIBLE).log()
    return probability, torch.ones_like(top), nll, _is_distribution(probability)


def judge_soft(predictions: Tensor, target: Tensor, from_logits: bool) -> Judged:
    """predictions and target: (n, classes), target the probabilities of the classes. Correct is argmax agreement."""
    log, probability = _distributions(predictions, from_logits)
    confidence, predicted = probability.max(dim=-1)
    brier = (probability - target).square().sum(dim=-1)
    log = probability.clamp(min=IMPOSSIBLE).log() if log is None else log.masked_fill(log == -torch.inf, _LEAST)
    nll = -(target * log).sum(dim=-1)
    valid = _is_distribution(probability) & _is_distribution(target)
    two = (probability[:, 1], target[:, 1] > 0.5) if target.size(-1) == 2 else (None, None)
    return Judged(confidence, predicted == target.argmax(dim=-1), brier, _bounded(nll), valid, *two)


def judge_binary(predictions: Tensor, target: Tensor, from_logits: bool) -> Judged:
    """predictions: (n,), the probability of class 1 or its log-odds. target: (n,), 0 to 1."""
    score = predictions.sigmoid() if from_logits else predictions
    target = target.to(score.dtype)
    if from_logits:
        log_one, log_zero = F.logsigmoid(predictions), F.logsigmoid(-predictions)
    else:
        log_one, log_zero = (p.clamp(min=IMPOSSIBLE).log() for p in (score, 1 - score))
    nll = -(target * log_one).masked_fill(target == 0, 0.0) - ((1 - target) * log_zero).masked_fill(target == 1, 0.0)
    positive, confidence = target >= 0.5, torch.maximum(score, 1 - score)
    valid = (score >= 0) & (score <= 1) & (target >= 0) & (target <= 1)
    brier = 2 * (score - target).square()
    return Judged(confidence, (score >= 0.5) == positive, brier, _bounded(nll), valid, score, positive)


def joined(parts: Sequence[Judged]) -> Judged:
    """Portions of one task as one."""
    rest = list(zip(*(part[:5] for part in parts), strict=True))
    scores = [(part.score, part.positive) for part in parts if part.score is not None and part.positive is not None]
    two = (torch.cat(column) for column in zip(*scores, strict=True)) if scores else (None, None)
    return Judged(*map(torch.cat, rest), *two)


def _distributions(predictions: Tensor, from_logits: bool) -> tuple[Tensor | None, Tensor]:
    if not from_logits:
        return None, predictions
    log = predictions.log_softmax(dim=-1)
    return log, log.exp()


def _is_distribution(probability: Tensor) -> Tensor:
    """NaN fails every comparison."""
    return (probability.amin(dim=-1) >= 0) & ((probability.sum(dim=-1) - 1).abs() <= _SLACK)


def _bounded(nll: Tensor) -> Tensor:
    """A class that masked logits (-inf) exclude: as improbable as can be."""
    return nll.masked_fill(nll == torch.inf, -_LEAST)
