"""Calibration: does a model that says 80 % hit in 80 % of the cases? Sums in fixed bins, in bounded memory.

`compute` adds up a batch of judged predictions (see `scoring`) on the device; rows merge by addition over batches and
ranks. The other functions say on the host what a row means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.statistics.buckets import MAGNITUDES, SHARES, magnitude_index, share_edges, share_index, tally
from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.scoring import Judged, are_meant, are_one_hot, judge, may_be_one_hot

Row: TypeAlias = "Sequence[float] | NDArray[np.float64]"
Curve: TypeAlias = dict[str, NDArray[np.float64]]

RANKING_BOUND = 0.02
"""How far auroc and average_precision may lie from those of the scores themselves."""

BINS = 15
"""Equal-width bins of the confidence: [a, b), the last one closed, so that a confidence of 1 is in bin 15."""

HEADER = ("count", "correct", "confidence", "brier", "nll", "ignored", "invalid")
"""Sums over the `count` examples that are judged; `ignored` have the ignore index for a target; `invalid` have a
prediction that is no distribution (NaN, below 0, above 1, not adding up to 1) or a target that names no class."""

SECTIONS = {
    "bins": (("count", "confidence", "correct"), BINS),
    "shares": (("count", "confidence", "correct"), SHARES),
    "refusal": (("count", "errors"), 1 + MAGNITUDES),
    "scores": (("negatives", "positives"), SHARES),
}
"""After the header, by name: columns and how many buckets each has. `bins` and `shares` are over the confidence,
`refusal` is over an uncertainty that was handed in (bucket 0: 0 or less), `scores` over a binary task's probability of
class 1."""

FIELDS = HEADER + tuple(
    f"{section}_{column}_{i}"
    for section, (columns, buckets) in SECTIONS.items()
    for column in columns
    for i in range(buckets)
)
"""Columns of a row."""


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
          last dimension of 1 on either. Floating targets of two columns or more are soft labels instead, and so are
          rows of integers, which are to be one-hot, where most predictions are distributions.
    uncertainty: as many numbers as examples; by it `risk_coverage` refuses them, otherwise by confidence.
    favourite: of (..., classes), the class with the largest number, when it is known; to look for it costs a fifth.

    Top-label: confidence is the largest probability. Brier is the sum over classes, 0 to 2, for a binary task too. An
    example whose class was given a probability of 0 adds 87.3 nats to NLL. An example is judged in float32, or in
    float64 for float64 predictions; sums are in the row's type.

    Temporaries are a cache's worth, but for soft labels of odd strides, which are copied. Makes no host read. Raises
    ValueError for shapes that do not go together and TypeError for predictions of integers.
    """
    if uncertainty is None and not from_logits and may_be_one_hot(predictions, targets):
        classes = compute(predictions, targets.to(predictions.dtype))
        answers = compute(predictions.reshape(-1), targets.reshape(-1), ignore_index=ignore_index)
        return torch.where(are_one_hot(predictions, targets), classes, answers)
    judged, target = judge(predictions, targets, from_logits, favourite)
    if uncertainty is not None and uncertainty.numel() != len(target):
        raise ValueError(f"uncertainty: got shape {tuple(uncertainty.shape)}, takes a number for each of {len(target)}")
    ignored = target == ignore_index if target.dim() == 1 else torch.zeros_like(judged.valid)
    return _row(judged, ignored, uncertainty)


@torch.no_grad()
def handed_in(predictions: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The row of what somebody hands in. Where most of it cannot be meant, such as logits, all of it is invalid."""
    row = compute(predictions, targets, ignore_index=ignore_index)
    nothing, (count, invalid) = torch.zeros_like(row), (HEADER.index(name) for name in ("count", "invalid"))
    nothing[invalid] = row[count] + row[invalid]
    nothing[HEADER.index("ignored")] = row[HEADER.index("ignored")]
    return torch.where(are_meant(predictions, targets, ignore_index), row, nothing)


def combine(a: Tensor, b: Tensor) -> Tensor:
    """The row of the examples of both."""
    return a + b


def summarise(row: Row) -> dict[str, float]:
    """Scalars: ece, mce, adaptive_ece, brier, nll, accuracy, confidence, confidence_gap, count, ignored, invalid.

    Without an example that is judged, the three counts alone. ece: mean over bins, weighted by their examples, of
    abs(accuracy - confidence) in 15 equal-width bins (Guo et al. 2017); mce its largest over non-empty bins.
    adaptive_ece: the same with 15 bins of equal mass, cut at the edges of 512 fine ones. confidence_gap: mean
    confidence - accuracy, above 0 when over-confident. A binary task with both classes has auroc and
    average_precision, whose scores tie within a fine bin: they are left out where the order within bins, which is not
    kept, may move them by more than `RANKING_BOUND`.
    """
    numbers = np.asarray(row, dtype=np.float64)  # on the host
    if numbers.shape != (len(FIELDS),):
        raise ValueError(f"row: got shape {numbers.shape}, takes ({len(FIELDS)},), as compute returns")
    values: dict[str, float] = dict(zip(HEADER, numbers.tolist(), strict=False))
    counts = {name: values[name] for name in ("count", "ignored", "invalid")}
    if not values["count"]:
        return counts
    means = {name: values[name] / values["count"] for name in ("brier", "nll", "confidence")}
    accuracy = values["correct"] / values["count"]
    gaps, shares = _gaps(*_section(row, "bins"))
    adaptive, masses = _gaps(*_equal_mass(_section(row, "shares")))
    return {
        **counts,
        **means,
        "accuracy": accuracy,
        "confidence_gap": means["confidence"] - accuracy,
        "ece": float(gaps @ shares),
        "mce": float(gaps.max()),
        "adaptive_ece": float(adaptive @ masses),
        **_ranking(row),
    }


def reliability(row: Row) -> Curve:
    """By non-empty bin of 15: lower and upper edge, confidence, accuracy, count. Empty without an example."""
    count, confidence, correct = _section(row, "bins")
    edges, some = np.arange(BINS + 1) / BINS, count > 0
    if not some.any():
        return {}
    return {
        "lower": edges[:-1][some],
        "upper": edges[1:][some],
        "confidence": confidence[some] / count[some],
        "accuracy": correct[some] / count[some],
        "count": count[some],
    }


def precision_recall(row: Row) -> Curve:
    """Of a binary task, by falling threshold: threshold, precision, recall, of "class 1 from the threshold on".

    One point for each fine bin that holds a score. Empty without a positive example.
    """
    threshold, found, false = _by_threshold(row)
    if not found.size or not found[-1]:
        return {}
    return {"threshold": threshold, "precision": found / (found + false), "recall": found / found[-1]}


def roc(row: Row) -> Curve:
    """Of a binary task, by falling threshold: threshold, false_positive_rate, true_positive_rate.

    Empty unless there are positive and negative examples.
    """
    threshold, found, false = _by_threshold(row)
    if not found.size or not found[-1] or not false[-1]:
        return {}
    return {"threshold": threshold, "false_positive_rate": false / false[-1], "true_positive_rate": found / found[-1]}


def risk_coverage(row: Row) -> Curve:
    """Share of examples kept, most certain first, and among these accuracy and risk (share of errors).

    Refused are the most uncertain by the `uncertainty` that was handed in, else the least confident. One point for each
    bucket that holds examples. Empty without an example.
    """
    count, errors = _section(row, "refusal")
    if not count.any():
        count, _, correct = _section(row, "shares")[:, ::-1]
        errors = count - correct
    some = count > 0
    if not some.any():
        return {}
    kept = np.cumsum(count[some])
    risk = np.cumsum(errors[some]) / kept
    return {"coverage": kept / kept[-1], "risk": risk, "accuracy": 1 - risk}


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


def _ranking(row: Row) -> dict[str, float]:
    curve = roc(row)
    if not curve:
        return {}
    precision = precision_recall(row)
    steps = np.diff(precision["recall"], prepend=0.0)
    false, true = (np.concatenate(([0.0], curve[name])) for name in ("false_positive_rate", "true_positive_rate"))
    found = {
        "auroc": (float(np.diff(false) @ (true[1:] + true[:-1]) / 2), float(np.diff(false) @ np.diff(true) / 2)),
        "average_precision": (float(steps @ precision["precision"]), _open_precision(row)),
    }
    return {name: value for name, (value, bound) in found.items() if bound <= RANKING_BOUND}


def _open_precision(row: Row) -> float:
    """By how much average precision may change with the order within bins: positives first, or negatives first."""
    _, found, false = _by_threshold(row)
    hits, misses = np.diff(found, prepend=0.0), np.diff(false, prepend=0.0)
    some = hits > 0
    hits, misses, found, false = hits[some], misses[some], found[some], false[some]
    before, as_binned = found - hits, found / (found + false)
    best = found / (found + false - misses)
    worst = ((before + 1) / (before + 1 + false) + as_binned) / 2  # precision is concave in the positives so far
    return float(hits @ np.maximum(best - as_binned, as_binned - worst) / found[-1])


def _by_threshold(row: Row) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Falling thresholds, positives and negatives from there on."""
    negatives, positives = _section(row, "scores")[:, ::-1]
    some = negatives + positives > 0
    return share_edges()[:-1][::-1][some], np.cumsum(positives[some]), np.cumsum(negatives[some])


def _gaps(
    count: NDArray[np.float64], confidence: NDArray[np.float64], correct: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """abs(accuracy - confidence) and the share of examples of each non-empty bin."""
    some = count > 0
    gaps: NDArray[np.float64] = np.abs(correct[some] - confidence[some]) / count[some]
    return gaps, count[some] / count.sum()


def _equal_mass(fine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fine bins put together to BINS of about equal counts: each goes where its middle example belongs."""
    count = fine[0]
    middle = np.cumsum(count) - count / 2
    group = np.minimum(middle * BINS // count.sum(), BINS - 1).astype(np.int64)
    return np.stack([np.bincount(group, column, BINS) for column in fine])


def _section(row: Row, name: str) -> NDArray[np.float64]:
    """(columns, buckets) of a section."""
    at = len(HEADER)
    for section, (columns, buckets) in SECTIONS.items():
        if section == name:
            break
        at += len(columns) * buckets
    return np.asarray(row, dtype=np.float64)[at : at + len(columns) * buckets].reshape(len(columns), buckets)
