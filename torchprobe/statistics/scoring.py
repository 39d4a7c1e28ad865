"""Predictions against their targets: confidence, whether it was right, Brier and logarithmic score of every example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from torchprobe.statistics.dtypes import arithmetic, examples

IMPOSSIBLE = 2.0**-126
"""A probability below this counts as this, the smallest normal float32: one example then adds 87.3 nats, not inf."""

_LEAST = math.log(IMPOSSIBLE)
_SLACK = 0.05  # by how much a distribution in a narrow type may miss 1
_MOST = 0.5
_NEARLY_ALL = 0.99
_NO_CLASS = -(2**62)


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


_Judge: TypeAlias = "Callable[..., Judged]"


def judge(
    predictions: Tensor, targets: Tensor, from_logits: bool, favourite: Tensor | None = None
) -> tuple[Judged, Tensor]:
    """The examples of `calibration.compute`, a chunk at a time, and their targets: (n,), or (n, classes) soft labels.

    In float32, in float64 for float64. Raises ValueError for shapes that do not go together, TypeError for integers.
    """
    dtype, task = arithmetic(predictions, "predictions"), _task(predictions, targets)
    target = targets.detach().reshape(-1, targets.size(-1)) if task is _judge_soft else targets.detach().reshape(-1)
    target = _class_numbers(target) if task is _judge_classes else target.to(dtype)
    best = favourite.reshape(-1) if favourite is not None and task is _judge_classes else None
    rows = predictions.detach().reshape(-1, 1) if task is _judge_binary else predictions.detach()
    found, at = [], 0
    for chunk in examples(rows, 1):
        end = at + len(chunk)
        known = () if best is None else (best[at:end],)
        values = (chunk[:, 0] if task is _judge_binary else chunk).to(dtype)
        found.append(task(values, target[at:end], from_logits, *known))
        at = end
    columns = zip(*found, strict=True)
    judged = Judged._make(None if column[0] is None else torch.cat(column) for column in columns)
    if task is _judge_soft and not from_logits:
        judged = judged._replace(valid=judged.valid & ~_are_answers(rows))
    return judged, target


def _class_numbers(target: Tensor) -> Tensor:
    """int64; what is no whole number names no class."""
    if not target.is_floating_point():
        return target.long()
    return torch.where(target == target.round(), target, _NO_CLASS).long()


def _are_answers(predictions: Tensor) -> Tensor:
    """A flag: whether most rows of numbers from 0 to 1 do not add up to 1. Those that do then do so by chance."""
    rows = predictions.reshape(-1, predictions.size(-1))
    inside, proper = (rows.amin(-1) >= 0) & (rows.amax(-1) <= 1), _is_distribution(rows)
    return (inside & ~proper).sum() > proper.sum()


def may_be_one_hot(predictions: Tensor, targets: Tensor) -> bool:
    """Whether integers or booleans of the predictions' shape may be rows of classes as well as answers yes or no."""
    rows = predictions.dim() > 1 and predictions.size(-1) > 1 and predictions.shape == targets.shape
    return rows and not targets.is_floating_point() and not targets.is_complex()


def are_one_hot(predictions: Tensor, targets: Tensor) -> Tensor:
    """A flag: whether they are rows of classes: most predictions are distributions, which answers are but by chance,
    and of two classes each row has its one, since two answers may well add up to 1.
    """
    one = (targets.long().sum(-1) == 1) & (targets.long().amin(-1) == 0)
    known = one.all() if predictions.size(-1) == 2 else True
    return known & (_is_distribution(predictions.detach()).to(torch.float32).mean() > _MOST)


def are_meant(predictions: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """A flag: whether predictions are probabilities at all, and targets those of their task. Of logits some look like
    probabilities, and of answers -1 and 1 half; NaN says nothing.
    """
    p, y = predictions.detach(), targets.detach()
    answers = _are_in_range(p, _SLACK).float().mean() >= _NEARLY_ALL
    answers &= (_are_in_range(y, 0.0) | (y == ignore_index)).all()
    if _task(p, y) is _judge_binary and not may_be_one_hot(p, y):
        return answers
    proper, broken = _is_distribution(p), p.isnan().any(-1)
    if y.dim() < p.dim():
        broken = broken | (y == ignore_index)
    distributions = proper.sum() >= (~proper & ~broken).sum()
    return distributions | answers if may_be_one_hot(p, y) else distributions


def _are_in_range(x: Tensor, slack: float) -> Tensor:
    return x.isnan() | ((x >= -slack) & (x <= 1 + slack))


def _task(predictions: Tensor, targets: Tensor) -> _Judge:
    """What kind of task the shapes tell."""
    shape, goal = tuple(predictions.shape), tuple(targets.shape)
    many = len(shape) > 0 and shape[-1] > 1
    if shape == goal:
        return _judge_soft if many and len(shape) > 1 and targets.is_floating_point() else _judge_binary
    if shape[:-1] == goal and len(shape) > 0 and shape[-1] > 0:
        return _judge_classes if many else _judge_binary
    if shape == goal[:-1] and goal[-1] == 1:
        return _judge_binary
    raise ValueError(
        f"targets: got shape {goal} for predictions of shape {shape}, takes {shape[:-1]} class numbers or {shape} "
        "probabilities; put classes last, such as with predictions.movedim(1, -1)"
    )


def _judge_classes(predictions: Tensor, target: Tensor, from_logits: bool, favourite: Tensor | None = None) -> Judged:
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


def _judge_soft(predictions: Tensor, target: Tensor, from_logits: bool) -> Judged:
    """predictions and target: (n, classes), target the probabilities of the classes. Correct is argmax agreement."""
    log = predictions.log_softmax(dim=-1) if from_logits else None
    probability = predictions if log is None else log.exp()
    confidence, predicted = probability.max(dim=-1)
    brier = (probability - target).square().sum(dim=-1)
    log = probability.clamp(min=IMPOSSIBLE).log() if log is None else log.masked_fill(log == -torch.inf, _LEAST)
    nll = -(target * log).sum(dim=-1)
    valid = _is_distribution(probability) & _is_distribution(target)
    two = (probability[:, 1], target[:, 1] > 0.5) if target.size(-1) == 2 else (None, None)
    return Judged(confidence, predicted == target.argmax(dim=-1), brier, _bounded(nll), valid, *two)


def _judge_binary(predictions: Tensor, target: Tensor, from_logits: bool) -> Judged:
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


def _is_distribution(probability: Tensor) -> Tensor:
    """NaN fails every comparison."""
    return (probability.amin(dim=-1) >= 0) & ((probability.sum(dim=-1) - 1).abs() <= _SLACK)


def _bounded(nll: Tensor) -> Tensor:
    """A class that masked logits (-inf) exclude: as improbable as can be."""
    return nll.masked_fill(nll == torch.inf, -_LEAST)


# ---- what class targets say of a batch and of a run


def judged(logits: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, which of them count, and their negative log-likelihood in nats, from cross-entropy's gradient.

    logits and gradients have shape (n, classes). The gradient at a row of logits is s (p - y), whose only negative
    entry is the target's; a row without one was ignored, or is lost to rounding. Returns (n,) integers, (n,) flags and
    (n,) numbers, on the device.
    """
    least, targets = gradients.min(-1)
    nll = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
    return targets, least < 0, nll


def class_counts(targets: Tensor, counted: Tensor, classes: int) -> Tensor:
    """How often each class is a target: shape (classes,), float32, of the targets that count."""
    zeros = torch.zeros(classes, dtype=torch.float32, device=targets.device)
    return zeros.index_add_(0, targets, counted.float())


def entropy(counts: Tensor) -> Tensor:
    """Of the distribution that counts tell, in nats: what always predicting the frequencies costs. NaN of none."""
    information: Tensor = torch.special.entr(counts / counts.sum())
    return information.sum()


def same_class(counts: Tensor) -> Tensor:
    """Share of pairs of different examples that are of one class. NaN of fewer than two."""
    n = counts.sum()
    return (counts * (counts - 1)).sum() / (n * (n - 1))
