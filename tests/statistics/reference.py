"""Slow twins of the statistics, in exact rational arithmetic on one element after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def elements(x: Tensor) -> list[float]:
    """Every element as a Python float, which is a float64 and so holds it exactly."""
    if x.is_complex():
        return [part for z in x.to(torch.complex128).flatten().tolist() for part in (z.real, z.imag)]
    return x.to(torch.float64).flatten().tolist()


def finite(x: Tensor) -> list[float]:
    return [value for value in elements(x) if math.isfinite(value)]


def nonfinite(x: Tensor) -> int:
    return len(elements(x)) - len(finite(x))


def moments(x: Tensor) -> list[float]:
    return _moments(finite(x), nonfinite(x))


def moments_of_all(tensors: Sequence[Tensor]) -> list[float]:
    """The moments of the concatenation."""
    return _moments([value for x in tensors for value in finite(x)], sum(map(nonfinite, tensors)))


def finite_sums(x: Tensor) -> list[float]:
    values = [abs(Fraction(value)) for value in finite(x)]
    return [_to_float(sum(v * v for v in values)), _to_float(sum(values)), nonfinite(x), len(values)]


def squares(x: Tensor) -> float:
    """The sum of squares of the finite elements; NaN where there are elements and none is finite."""
    return math.nan if nonfinite(x) and not finite(x) else finite_sums(x)[0]


def largest(x: Tensor) -> float:
    return max(map(abs, elements(x)), default=0.0)


def log_histogram(x: Tensor, low: int, high: int) -> list[int]:
    values = finite(x)
    counts = [0] * (high - low + 1)
    for value in values:
        if value:
            exponent = math.frexp(value)[1] - 1  # 2**exponent <= abs(value) < 2**(exponent + 1)
            counts[min(max(exponent, low), high) - low] += 1
    return [values.count(0.0), nonfinite(x), *counts]


def _moments(values: Sequence[float], bad: int) -> list[float]:
    if not values:
        return [0, 0, 0, 0, 0, bad, 0]
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    m2 = sum((value - mean) ** 2 for value in exact)
    largest = max(map(abs, exact))
    fourth = sum((value / largest) ** 4 for value in exact) if largest else 0
    return [len(values), _to_float(mean), _to_float(m2), float(largest), values.count(0.0), bad, _to_float(fourth)]


def kurtosis(values: Sequence[float]) -> float | None:
    """The fourth moment about 0 over the squared second one, minus 3; None where all are 0."""
    exact = [Fraction(value) for value in values]
    squares = sum(value**2 for value in exact)
    return _to_float(len(exact) * sum(value**4 for value in exact) / squares**2 - 3) if squares else None


def _to_float(exact: Fraction | int) -> float:
    try:
        return float(exact)
    except OverflowError:
        return math.inf
