"""What a calibration row holds, and where."""

from __future__ import annotations

from torchprobe.statistics.buckets import MAGNITUDES, SHARES

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
