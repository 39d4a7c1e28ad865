"""What differs between two runs, biggest first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchprobe.reports.run import Run, Series


@dataclass(frozen=True, slots=True)
class Difference:
    """A tag of both runs: where each has settled (`Series.settled`), and how far apart that is.

    size is |a - b| over the largest of |a|, |b| and the spread of either, from 0 (equal) to 2 (of opposite sign and
    equal size); infinite when one of the two is not finite.
    """

    tag: str
    a: float
    b: float
    size: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences of common tags, biggest first, and the tags that one run alone has.

    hparams: the hyperparameters that differ, as (name, first run's, second run's); None where a run has none.
    """

    differences: list[Difference]
    only_a: list[str]
    only_b: list[str]
    hparams: list[tuple[str, Any, Any]]


def compare(a: Run, b: Run) -> Comparison:
    """Compare every scalar tag of two runs."""
    common = a.scalars.keys() & b.scalars.keys()
    found = [_difference(tag, a.scalars[tag], b.scalars[tag]) for tag in sorted(common)]
    found.sort(key=lambda difference: difference.size, reverse=True)
    return Comparison(
        found, sorted(a.scalars.keys() - common), sorted(b.scalars.keys() - common), _hparams(a.hparams, b.hparams)
    )


def _hparams(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    pairs = ((name, a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()))
    return [(name, one, other) for name, one, other in pairs if (type(one), one) != (type(other), other)]


def _difference(tag: str, one: Series, other: Series) -> Difference:
    a, b = one.settled, other.settled
    if not (math.isfinite(a) and math.isfinite(b)):
        same = math.isnan(a) and math.isnan(b)
        return Difference(tag, a, b, 0.0 if same else math.inf)
    scale = max(abs(a), abs(b), one.spread, other.spread)
    return Difference(tag, a, b, abs(a - b) / scale if scale else 0.0)
