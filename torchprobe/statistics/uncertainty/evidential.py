"""Uncertainty of evidential models, whose output is a distribution over predictions, in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.portions import arithmetic, portions
from torchprobe.statistics.uncertainty.decomposition import Decomposition, entropy


@torch.no_grad()
def dirichlet(alpha: Tensor) -> Decomposition:
    """Entropies in nats of class predictions under Dirichlet(alpha): (..., classes), alpha = evidence + 1.

    With S the sum of alpha, p = alpha / S and psi the digamma function: total = H(p), aleatoric = E[H] =
    Σ p (psi(S + 1) - psi(alpha + 1)), epistemic = total - aleatoric, clamped at 0 (Malinin & Gales 2018). An example
    with an alpha that is not above 0 has NaN. In `row_dtype`, since the difference is small where evidence is large.
    Raises ValueError without a class and TypeError for integers.
    """
    columns = [_dirichlet(part) for part in _proper(alpha)]
    if not columns:
        nothing = torch.zeros(0, dtype=row_dtype(alpha.device), device=alpha.device)
        return Decomposition(nothing, nothing, nothing)
    return Decomposition(*(torch.cat(column) for column in zip(*columns, strict=True)))


@torch.no_grad()
def vacuity(alpha: Tensor) -> Tensor:
    """Classes / sum of alpha (Sensoy et al. 2018), (..., classes) -> (examples,): 1 without evidence, 0 with all."""
    parts = [part.size(-1) / part.sum(dim=-1) for part in _proper(alpha)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=row_dtype(alpha.device), device=alpha.device)


@torch.no_grad()
def normal_inverse_gamma(
    nu: Tensor, alpha: Tensor, beta: Tensor, convention: Literal["amini", "meinert"] = "amini"
) -> Decomposition:
    """Variances of a number's prediction under a normal-inverse-gamma distribution; gamma, its mean, is not needed.

    "amini" (Amini et al. 2020): aleatoric beta / (alpha - 1), epistemic aleatoric / nu, total their sum.
    "meinert" (Meinert et al. 2023), squares of the widths that they give: aleatoric beta (1 + nu) / (alpha nu), the
    scale of the predictive Student t, and epistemic 1 / nu, which is relative and so has no unit; total is the variance
    of that Student t, beta (1 + nu) / ((alpha - 1) nu), which is Amini's total too.

    Any shapes that broadcast, flattened to examples, in `row_dtype`. NaN where a parameter is out of its range: all
    above 0, and alpha above 1 for what has alpha - 1. Raises ValueError for another convention, TypeError for integers.
    """
    if convention not in ("amini", "meinert"):
        raise ValueError(f"convention={convention!r}: takes 'amini' or 'meinert'")
    for name, x in (("nu", nu), ("alpha", alpha), ("beta", beta)):
        arithmetic(x, name)
    dtype = row_dtype(nu.device)
    nu, alpha, beta = (x.detach().to(dtype).flatten() for x in torch.broadcast_tensors(nu, alpha, beta))
    proper = (nu > 0) & (alpha > 0) & (beta > 0)
    spread = _where(proper & (alpha > 1), beta / (alpha - 1))
    if convention == "amini":
        return Decomposition(spread + spread / nu, spread, spread / nu)
    scale = _where(proper, beta * (1 + nu) / (alpha * nu))
    return Decomposition(spread + spread / nu, scale, _where(proper, 1 / nu))


def _dirichlet(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    evidence = alpha.sum(dim=-1, keepdim=True)
    mean = alpha / evidence
    total = entropy(mean)
    aleatoric = (mean * (torch.digamma(evidence + 1) - torch.digamma(alpha + 1))).sum(dim=-1)
    return total, aleatoric, (total - aleatoric).clamp(min=0)


def _proper(alpha: Tensor) -> Iterator[Tensor]:
    """Portions of examples in `row_dtype`; one that is no parameter of a Dirichlet distribution is NaN."""
    arithmetic(alpha, "alpha")
    if alpha.dim() == 0 or alpha.size(-1) == 0:
        raise ValueError(f"alpha: got shape {tuple(alpha.shape)}, takes (..., classes) with at least one class")
    for part in portions(alpha.detach(), 1):
        yield _where(((part > 0) & part.isfinite()).all(dim=-1, keepdim=True), part.to(row_dtype(alpha.device)))


def _where(condition: Tensor, value: Tensor) -> Tensor:
    return value.masked_fill(~condition, torch.nan)
