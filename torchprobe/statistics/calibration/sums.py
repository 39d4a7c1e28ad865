"""The calibration row of a batch of predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from torchprobe.statistics.buckets import SHARES, magnitude_index, share_index, tally
from torchprobe.statistics.calibration.examples import Judged, joined, judge_binary, judge_classes, judge_soft
from torchprobe.statistics.calibration.layout import BINS, FIELDS, SECTIONS
from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.portions import arithmetic, portions

_Judge: TypeAlias = "Callable[..., Judged]"


@torch.no_grad()
def compute(
    predictions: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    from_logits: bool = False,
    uncertainty: Tensor | None = None,
    favourite: Tensor | None = None,
) -> Tensor:
    """The row of a batch: shape (len(FIELDS),), `row_dtype`, on the device. Rows merge by addition.

    predictions: probabilities; logits or log-probabilities with `from_logits`. Of several members hand in the mean
        probability. With targets they are one of
        - (..., classes) and class numbers (...): those of `ignore_index` are left out and counted;
        - (..., classes) and floating (..., classes): soft labels; "correct" then means that both have the same argmax;
        - a binary task: probabilities (or log-odds) of class 1 and targets from 0 to 1, of one shape, (...), or with a
          last dimension of 1 on either. Floating targets of two columns or more are soft labels instead.
    uncertainty: as many numbers as examples; by it `risk_coverage` refuses them, otherwise by confidence.
    favourite: of (..., classes), the class with the largest number, when it is known; to look for it costs a fifth.

    Top-label: confidence is the largest probability. Brier is the sum over classes, 0 to 2, for a binary task too. An
    example whose class was given a probability of 0 adds 87.3 nats to NLL. An example is judged in float32, or in
    float64 for float64 predictions; sums are in the row's type.

    Temporaries are a cache's worth, but for soft labels of odd strides, which are copied. Makes no host read. Raises
    ValueError for shapes that do not go together and TypeError for predictions of integers.
    """
    dtype = arithmetic(predictions, "predictions")
    judge = _task(predictions, targets)
    target = targets.detach().reshape(-1, targets.size(-1)) if judge is judge_soft else targets.detach().reshape(-1)
    target = target.to(dtype) if judge is not judge_classes else target.long()
    if uncertainty is not None and uncertainty.numel() != len(target):
        raise ValueError(f"uncertainty: got shape {tuple(uncertainty.shape)}, takes a number for each of {len(target)}")
    best = favourite.reshape(-1) if favourite is not None and judge is judge_classes else None
    parts = list(_judged(judge, predictions.detach(), target, dtype, from_logits, best))
    if not parts:
        return torch.zeros(len(FIELDS), dtype=row_dtype(predictions.device), device=predictions.device)
    judged = parts[0] if len(parts) == 1 else joined(parts)
    ignored = torch.zeros_like(judged.valid) if judge is judge_soft else target == ignore_index
    return _row(judged, ignored, uncertainty)


def combine(a: Tensor, b: Tensor) -> Tensor:
    """The row of the examples of both."""
    return a + b


def _task(predictions: Tensor, targets: Tensor) -> _Judge:
    """What kind of task the shapes tell."""
    shape, goal = tuple(predictions.shape), tuple(targets.shape)
    many = len(shape) > 0 and shape[-1] > 1
    if shape == goal:
        return judge_soft if many and len(shape) > 1 and targets.is_floating_point() else judge_binary
    if shape[:-1] == goal and len(shape) > 0 and shape[-1] > 0:
        return judge_classes if many else judge_binary
    if shape == goal[:-1] and goal[-1] == 1:
        return judge_binary
    raise ValueError(
        f"targets: got shape {goal} for predictions of shape {shape}, takes {shape[:-1]} class numbers or {shape} "
        "probabilities; put classes last, such as with predictions.movedim(1, -1)"
    )


def _judged(
    judge: _Judge, predictions: Tensor, target: Tensor, dtype: torch.dtype, logits: bool, best: Tensor | None
) -> Iterator[Judged]:
    binary, at = judge is judge_binary, 0
    for part in portions(predictions.reshape(-1, 1) if binary else predictions, 1):
        end = at + len(part)
        some = () if best is None else (best[at:end],)
        yield judge((part[:, 0] if binary else part).to(dtype), target[at:end], logits, *some)
        at = end


def _row(judged: Judged, ignored: Tensor, uncertainty: Tensor | None) -> Tensor:
    wide = row_dtype(judged.valid.device)
    valid = judged.valid & ~ignored
    confidence, brier, nll = (
        x.to(wide).masked_fill(~valid, 0.0) for x in (judged.confidence.clamp(max=1), judged.brier, judged.nll)
    )
    correct = judged.correct & valid
    of_confidence = (valid, confidence, correct)
    header = [x.sum(dtype=wide) for x in (valid, correct, confidence, brier, nll, ignored, ~judged.valid & ~ignored)]
    sections = (
        tally((confidence * BINS).long().clamp(0, BINS - 1), BINS, *of_confidence),
        tally(share_index(confidence), SHARES, *of_confidence),
        _refusal(uncertainty, valid, correct),
        _scores(judged, valid),
    )
    return torch.cat([torch.stack(header), *(section.flatten() for section in sections)])


def _refusal(uncertainty: Tensor | None, valid: Tensor, correct: Tensor) -> Tensor:
    buckets = SECTIONS["refusal"][1]
    if uncertainty is None:
        return torch.zeros(2 * buckets, dtype=row_dtype(valid.device), device=valid.device)
    doubt = uncertainty.detach().flatten().to(row_dtype(valid.device))
    known = valid & ~doubt.isnan()
    index = torch.where(doubt > 0, 1 + magnitude_index(doubt.nan_to_num(0.0, 2.0**99, 0.0)), 0)
    return tally(index, buckets, known, known & ~correct)


def _scores(judged: Judged, valid: Tensor) -> Tensor:
    if judged.score is None or judged.positive is None:
        return torch.zeros(2 * SHARES, dtype=row_dtype(valid.device), device=valid.device)
    index = share_index(judged.score.to(row_dtype(valid.device)))
    return tally(index, SHARES, valid & ~judged.positive, valid & judged.positive)
