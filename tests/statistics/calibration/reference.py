"""Slow twins: one example after the other, in Python floats, and curves over all examples instead of bins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from tests.statistics.uncertainty.reference import softmax

LARGEST_NLL = 126 * math.log(2)


class Example(NamedTuple):
    confidence: float
    correct: bool
    brier: float
    nll: float


def is_distribution(p: Sequence[float]) -> bool:
    return all(0 <= x < math.inf for x in p) and abs(math.fsum(p) - 1) <= 0.05


def are_answers(rows: Sequence[Sequence[float]]) -> bool:
    """Whether most rows of numbers from 0 to 1 are no distributions: those that are then add up to 1 by chance."""
    inside = [row for row in rows if all(0 <= x <= 1 for x in row)]
    return sum(not is_distribution(row) for row in inside) > sum(is_distribution(row) for row in rows)


def log(p: float) -> float:
    return -LARGEST_NLL if p < 2.0**-126 else math.log(p)


def log_softmax(logits: Sequence[float], k: int) -> float:
    if logits[k] == -math.inf:
        return -LARGEST_NLL
    largest = max(logits)
    return logits[k] - largest - math.log(math.fsum(math.exp(x - largest) for x in logits))


def judge(row: Sequence[float], target: Sequence[float], from_logits: bool) -> Example | None:
    """One prediction against the probabilities of its classes; None when either is no distribution."""
    p = softmax(row) if from_logits else row
    if not is_distribution(p) or not is_distribution(target):
        return None
    logs = [log_softmax(row, k) if from_logits else log(p[k]) for k in range(len(p))]
    return Example(
        confidence=min(max(p), 1.0),
        correct=p.index(max(p)) == target.index(max(target)),
        brier=math.fsum((a - b) ** 2 for a, b in zip(p, target, strict=True)),
        nll=-math.fsum(t * one for t, one in zip(target, logs, strict=True) if t),
    )


def one_hot(k: int, classes: int) -> list[float]:
    return [float(i == k) for i in range(classes)]


def ece(examples: Sequence[Example], bins: Sequence[Sequence[Example]] | None = None) -> float:
    return math.fsum(abs(gap(part)) * len(part) for part in bins or equal_width(examples)) / len(examples)


def mce(examples: Sequence[Example]) -> float:
    return max(abs(gap(part)) for part in equal_width(examples))


def gap(examples: Sequence[Example]) -> float:
    return math.fsum(e.confidence - e.correct for e in examples) / len(examples)


def equal_width(examples: Sequence[Example]) -> list[list[Example]]:
    bins: list[list[Example]] = [[] for _ in range(15)]
    for example in examples:
        bins[min(math.floor(example.confidence * 15), 14)].append(example)
    return [part for part in bins if part]


def equal_mass(examples: Sequence[Example]) -> list[list[Example]]:
    ordered, n = sorted(examples), len(examples)
    cuts = [round(i * n / 15) for i in range(16)]
    return [ordered[a:b] for a, b in pairwise(cuts) if b > a]
