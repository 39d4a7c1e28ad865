"""Attention: entropy, largest logit and probability, sink mass and distance of every head, from chosen query rows.

`compute` takes what an attention call works on, before its softmax: queries and keys, or hand-written logits. It
reads chosen query rows against all keys, so the matrix of queries by keys is never there. Read in this order:
`sources` (what was captured), `rows` (which query rows, and how many at a time), `keys` (which keys a row sees, and how
far they are), `blocks` (the logits), `heads` (the statistic, and the picture), `sums` (of all rows of a head).
"""

from torchprobe.statistics.attention.heads import attention_map, combine, compute, measure, summarise
from torchprobe.statistics.attention.keys import sees_older_behind
from torchprobe.statistics.attention.rows import Rows, choose, is_sampled
from torchprobe.statistics.attention.sources import Logits, QueryKey, Source
from torchprobe.statistics.attention.sums import FIELDS, MAX_LOGIT, Measured, finish

__all__ = [
    "FIELDS",
    "MAX_LOGIT",
    "Logits",
    "Measured",
    "QueryKey",
    "Rows",
    "Source",
    "attention_map",
    "choose",
    "combine",
    "compute",
    "finish",
    "is_sampled",
    "measure",
    "sees_older_behind",
    "summarise",
]
