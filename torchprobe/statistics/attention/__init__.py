"""Attention: entropy, largest logit and probability, sink mass and distance of every head, from chosen query rows.

`compute` takes what an attention call works on, before its softmax: queries and keys, or hand-written logits. It
reads chosen query rows against all keys, so the matrix of queries by keys is never there. Read in this order:
`sources` (what was captured), `rows` (which query rows), `parts` (in which portions), `visibility` (which keys a
row sees), `blocks` (the logits), `sums` (the statistic), `maps` (the picture).
"""

from torchprobe.statistics.attention.maps import attention_map
from torchprobe.statistics.attention.rows import is_sampled
from torchprobe.statistics.attention.sources import Logits, QueryKey, Source
from torchprobe.statistics.attention.sums import FIELDS, combine, compute, summarise

__all__ = [
    "FIELDS",
    "Logits",
    "QueryKey",
    "Source",
    "attention_map",
    "combine",
    "compute",
    "is_sampled",
    "summarise",
]
