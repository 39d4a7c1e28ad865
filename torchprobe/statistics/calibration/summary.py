"""A calibration row in readable terms, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from torchprobe.statistics.buckets import share_edges
from torchprobe.statistics.calibration.layout import BINS, FIELDS, HEADER, SECTIONS

Row: TypeAlias = "Sequence[float] | NDArray[np.float64]"
Curve: TypeAlias = dict[str, NDArray[np.float64]]


def summarise(row: Row) -> dict[str, float]:
    """Scalars: ece, mce, adaptive_ece, brier, nll, accuracy, confidence, confidence_gap, count, ignored, invalid.

    Without an example that is judged, the three counts alone. ece: mean over bins, weighted by their examples, of
    abs(accuracy - confidence) in 15 equal-width bins (Guo et al. 2017); mce its largest over non-empty bins.
    adaptive_ece: the same with 15 bins of equal mass, cut at the edges of 512 fine ones. confidence_gap: mean
    confidence - accuracy, above 0 when over-confident. A binary task with both classes has auroc and
    average_precision, whose scores tie within a fine bin.
    """
    values = dict(zip(HEADER, _header(row), strict=True))
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
    return {
        "threshold": threshold,
        "false_positive_rate": false / false[-1],
        "true_positive_rate": found / found[-1],
    }


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


def _ranking(row: Row) -> dict[str, float]:
    curve = roc(row)
    if not curve:
        return {}
    precision = precision_recall(row)
    steps = np.diff(precision["recall"], prepend=0.0)
    false, true = (np.concatenate(([0.0], curve[name])) for name in ("false_positive_rate", "true_positive_rate"))
    auroc = np.diff(false) @ (true[1:] + true[:-1]) / 2
    return {"auroc": float(auroc), "average_precision": float(steps @ precision["precision"])}


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


def _header(row: Row) -> list[float]:
    values = np.asarray(row, dtype=np.float64)
    if values.shape != (len(FIELDS),):
        raise ValueError(f"row: got shape {values.shape}, takes ({len(FIELDS)},), as compute returns")
    header: list[float] = values[: len(HEADER)].tolist()
    return header


def _section(row: Row, name: str) -> NDArray[np.float64]:
    """(columns, buckets) of a section."""
    at = len(HEADER)
    for section, (columns, buckets) in SECTIONS.items():
        if section == name:
            break
        at += len(columns) * buckets
    return np.asarray(row, dtype=np.float64)[at : at + len(columns) * buckets].reshape(len(columns), buckets)
