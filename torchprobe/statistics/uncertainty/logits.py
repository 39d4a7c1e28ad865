"""Uncertainty straight from logits, which may be large: they are read in portions and never copied as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from torchprobe.statistics.portions import arithmetic, portions
from torchprobe.statistics.uncertainty.decomposition import Decomposition, check_samples, decompose, joined

FLOOR = -80.0
"""Logits further below the largest count as this: exp(-80) is 2e-35, and no slow denormal number."""


@torch.no_grad()
def predictive_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of each example in nats: (..., classes) -> (examples,).

    With m = max, t = logit - m, e = exp t, Z = Σe: log Z - Σe·t / Z, never negative, within 1e-5 for any size of
    logits, and for masked ones (-inf). An example with NaN, +inf or nothing but -inf has NaN. Float32, or float64 for
    float64. Costs about 2 ns a logit on a CPU core. Raises ValueError without a class and TypeError for integers.
    """
    dtype = arithmetic(logits, "logits")
    if logits.dim() == 0 or logits.size(-1) == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, takes (..., classes) with at least one class")
    parts = [_entropy(part.to(dtype)) for part in portions(logits.detach(), 1)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=logits.device)


@torch.no_grad()
def classification_from_logits(logits: Tensor) -> Decomposition:
    """`classification` of the softmax of each member: (samples, ..., classes).

    The softmax comes first and the mean after: the softmax of the mean logits would be another model's prediction.
    """
    dtype = arithmetic(logits, "logits")
    check_samples("logits", logits, least=2)
    views = portions(logits.detach().movedim(0, -2), 2)
    return joined([decompose(part.to(dtype).softmax(dim=-1)) for part in views], logits, dtype)


def _entropy(logits: Tensor) -> Tensor:
    below = (logits - logits.amax(dim=-1, keepdim=True)).clamp_(min=FLOOR)
    weight = below.exp()
    total = weight.sum(dim=-1)
    return (total.log() - below.mul_(weight).sum(dim=-1) / total).clamp_(min=0)
