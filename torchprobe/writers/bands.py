"""How a statistic is spread over the layers: its smallest, median and largest value at a step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from numbers import Real

import numpy as np

from torchprobe.records import Record

GROUP = "layers"
DESCRIPTION = "A statistic over all layers of the model: the smallest, the median and the largest finite value."
BANDED = frozenset(
    {
        "activation_grad_norm",
        "activation_rms",
        "activation_zero_fraction",
        "attention_entropy",
        "attention_max_logit",
        "attention_sink",
        "grad_mean_abs",
        "grad_norm_layer",
        "update_ratio",
    }
)


def band_tags(prefix: str, group: str) -> tuple[str, str, str]:
    """Tags of the median, the smallest and the largest; prefix is empty or `val/`."""
    start = f"{prefix}{GROUP}/{group}"
    return f"{start}/median", f"{start}/min", f"{start}/max"


def bands(record: Record) -> Iterator[tuple[str, float]]:
    """Tags and values of the bands of a record; a group with fewer than two finite values has none."""
    for (prefix, group), values in _by_group(record).items():
        if len(values) > 1:
            spread = (float(np.median(values)), min(values), max(values))
            yield from zip(band_tags(prefix, group), spread, strict=True)


def _by_group(record: Record) -> dict[tuple[str, str], list[float]]:
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for tag, value in record.values.items():
        rest = tag.removeprefix("val/")
        group = rest.partition("/")[0]
        if group in BANDED and isinstance(value, Real) and math.isfinite(value):
            found["val/" if rest is not tag else "", group].append(float(value))
    return found
