"""Calibration: does a model that says 80 % hit in 80 % of the cases? Sums in fixed bins, in bounded memory.

`compute` judges a batch of predictions on the device; rows merge by addition over batches and ranks. Read `examples`
(one prediction), `layout` (the row), `sums` (the batch), `summary` (on the host) in this order.
"""

from torchprobe.statistics.calibration.layout import BINS, FIELDS
from torchprobe.statistics.calibration.summary import precision_recall, reliability, risk_coverage, roc, summarise
from torchprobe.statistics.calibration.sums import combine, compute

__all__ = [
    "BINS",
    "FIELDS",
    "combine",
    "compute",
    "precision_recall",
    "reliability",
    "risk_coverage",
    "roc",
    "summarise",
]
