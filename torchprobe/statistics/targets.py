"""What class targets say of a batch and of a run: how well they are predicted, how they are spread."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def judged(logits: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, which of them count, and their negative log-likelihood in nats, from cross-entropy's gradient.

    logits and gradients have shape (n, classes). The gradient at a row of logits is s (p - y), whose only negative
    entry is the target's; a row without one was ignored, or is lost to rounding. Returns (n,) integers, (n,) flags and
    (n,) numbers, on the device.
    """
    least, targets = gradients.min(-1)
    nll = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
    return targets, least < 0, nll


def class_counts(targets: Tensor, counted: Tensor, classes: int) -> Tensor:
    """How often each class is a target: shape (classes,), float32, of the targets that count."""
    zeros = torch.zeros(classes, dtype=torch.float32, device=targets.device)
    return zeros.index_add_(0, targets, counted.float())


def entropy(counts: Tensor) -> Tensor:
    """Of the distribution that counts tell, in nats: what always predicting the frequencies costs. NaN of none."""
    p = counts / counts.sum()
    information: Tensor = torch.special.xlogy(p, p)
    return -information.sum()


def same_class(counts: Tensor) -> Tensor:
    """Share of pairs of different examples that are of one class. NaN of fewer than two."""
    n = counts.sum()
    return (counts * (counts - 1)).sum() / (n * (n - 1))
