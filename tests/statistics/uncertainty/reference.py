"""Slow twins: one example after the other, in Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def entropy(p: Sequence[float]) -> float:
    if any(not 0 <= x < math.inf for x in p):
        return math.nan
    return math.fsum(-x * math.log(x) for x in p if x > 0)


def softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    if any(math.isnan(x) for x in logits) or math.isinf(largest):
        return [math.nan] * len(logits)
    e = [math.exp(x - largest) for x in logits]
    return [x / math.fsum(e) for x in e]


def per_example(x: Tensor) -> list[list[list[float]]]:
    """(samples, ..., classes) as examples of samples of classes."""
    return x.double().movedim(0, -2).reshape(-1, len(x), x.size(-1)).tolist()


def classification(members: list[list[float]]) -> tuple[float, float, float]:
    """total, aleatoric, epistemic of one example."""
    mean = [math.fsum(column) / len(members) for column in zip(*members, strict=True)]
    total, aleatoric = entropy(mean), math.fsum(map(entropy, members)) / len(members)
    return total, aleatoric, math.nan if math.isnan(total - aleatoric) else max(total - aleatoric, 0.0)


def assert_near(found: Tensor, expected: list[float], tolerance: float = 1e-5) -> None:
    """Equal where the twin is finite, and not finite where it is not."""
    twin = torch.tensor(expected, dtype=torch.float64)
    assert found.shape == twin.shape
    assert torch.equal(found.isfinite(), twin.isfinite())
    some = twin.isfinite()
    torch.testing.assert_close(found[some].double(), twin[some], atol=tolerance, rtol=tolerance)
