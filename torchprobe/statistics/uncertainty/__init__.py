"""Uncertainty, split into what is in the data (aleatoric) and what the model does not know (epistemic).

The decompositions give a number an example, on the device; `compute` adds those up. Read `decomposition`, `logits`,
`evidential`, `sums` in this order.
"""

from torchprobe.statistics.uncertainty.decomposition import Decomposition, classification, regression
from torchprobe.statistics.uncertainty.evidential import dirichlet, normal_inverse_gamma, vacuity
from torchprobe.statistics.uncertainty.logits import classification_from_logits, predictive_entropy
from torchprobe.statistics.uncertainty.sums import FIELDS, KINDS, combine, compute, edges, histograms, summarise

__all__ = [
    "FIELDS",
    "KINDS",
    "Decomposition",
    "classification",
    "classification_from_logits",
    "combine",
    "compute",
    "dirichlet",
    "edges",
    "histograms",
    "normal_inverse_gamma",
    "predictive_entropy",
    "regression",
    "summarise",
    "vacuity",
]
