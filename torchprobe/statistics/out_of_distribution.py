"""How well a score separates data of the training distribution from other data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.statistics.dtypes import arithmetic, row_dtype
from torchprobe.statistics.histograms import HEADER, linear_edges, linear_histogram

BUCKETS = 64
SIDES = ("in", "out")

_HISTOGRAM = len(HEADER) + BUCKETS
_HEADER = ("wins", "count_in", "count_out")

FIELDS = _HEADER + tuple(
    f"{side}_{name}" for side in SIDES for name in (*HEADER, *(f"bucket_{i}" for i in range(BUCKETS)))
)
"""Columns of a row: pairs in which the outside score is the higher one, ties by half; how many finite scores; and of
each side a histogram as `linear_histogram` makes it. Rows do not merge: another batch makes other pairs."""


@torch.no_grad()
def compute(in_scores: Tensor, out_scores: Tensor) -> Tensor:
    """The row of two sets of scores, any shapes: (len(FIELDS),), `row_dtype`, on their device. Exact.

    A score is to be high outside the distribution, such as epistemic uncertainty. NaN and inf are left out of the
    pairs and counted. Sorts both sets; makes no host read. Raises TypeError for scores of integers.
    """
    for name, x in (("in_scores", in_scores), ("out_scores", out_scores)):
        arithmetic(x, name)
    inside, outside = (x.detach().flatten().to(row_dtype(x.device)) for x in (in_scores, out_scores))
    counts = torch.stack((inside.isfinite().sum(), outside.isfinite().sum()))
    ordered = inside.masked_fill(~inside.isfinite(), torch.inf).sort().values  # those at the end are never counted
    finite = outside.isfinite()
    probe = outside.masked_fill(~finite, 0.0)
    below = torch.searchsorted(ordered, probe)
    up_to = torch.searchsorted(ordered, probe, right=True)
    wins = ((below + up_to) * finite).sum() / 2
    histograms = (linear_histogram(x, BUCKETS) for x in (inside, outside))
    return torch.cat((torch.cat((wins[None], counts)).to(inside.dtype), *histograms))


def summarise(row: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """auroc, and by side count_in, nonfinite_in, ...; no auroc when a side has no score.

    auroc: the probability that a score from outside is above one from inside, ties by half; 0.5 is chance.
    """
    values = dict(zip(FIELDS, np.asarray(row, dtype=np.float64).tolist(), strict=True))  # on the host
    counts = {f"count_{side}": values[f"count_{side}"] for side in SIDES}
    counts |= {f"nonfinite_{side}": values[f"{side}_nonfinite"] for side in SIDES}
    pairs = values["count_in"] * values["count_out"]
    return counts | ({"auroc": values["wins"] / pairs} if pairs else {})


def histograms(row: Sequence[float] | NDArray[np.float64]) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Edges and counts by side, "in" and "out"; a side without a score is left out."""
    sides = np.asarray(row, dtype=np.float64)[len(_HEADER) :].reshape(len(SIDES), _HISTOGRAM)
    found = {}
    for side, (low, high, _, *counts) in zip(SIDES, sides.tolist(), strict=True):  # on the host
        if any(counts):
            found[side] = (linear_edges(low, high, BUCKETS), np.asarray(counts, dtype=np.int64))
    return found
