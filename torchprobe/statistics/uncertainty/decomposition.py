"""Uncertainty of every example from the predictions of several members: an ensemble, or passes with dropout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.statistics.portions import arithmetic, portions


class Decomposition(NamedTuple):
    """Uncertainty of every example, (examples,) each; None is what the predictions do not tell.

    Entropies in nats, or variances in the squared unit of the target. An example with a prediction that is not
    finite has NaN or inf here.
    """

    total: Tensor | None
    aleatoric: Tensor | None
    epistemic: Tensor | None


@torch.no_grad()
def classification(probabilities: Tensor) -> Decomposition:
    """Entropies of class predictions, from (samples, ..., classes), any leading shape flattened to examples.

    total = H(mean p), aleatoric = mean H(p), epistemic = total - aleatoric: the mutual information of class and
    weights (BALD, Houlsby et al. 2011), clamped at 0. One sample gives the total alone: a single prediction does not
    tell its parts apart. H = -Σ p log p with 0 log 0 = 0.

    In float32, in float64 for float64; within 1e-5 of exact arithmetic. Temporaries are a cache's worth. Raises
    ValueError for another shape and TypeError for integers.
    """
    dtype = arithmetic(probabilities, "probabilities")
    check_samples("probabilities", probabilities, least=2)
    parts = [decompose(part.to(dtype)) for part in portions(probabilities.detach().movedim(0, -2), 2)]
    return joined(parts, probabilities, dtype)


@torch.no_grad()
def regression(means: Tensor, variances: Tensor | None = None) -> Decomposition:
    """Variances of number predictions, from (samples, ...) means and predicted variances: law of total variance.

    aleatoric = E[σ²], epistemic = Var[μ] (of the samples as they are: divided by their number), total = their sum.
    Without variances only the epistemic part is known; from one sample only the aleatoric one, which is the total.
    Raises ValueError for shapes that differ and TypeError for integers.
    """
    dtype = arithmetic(means, "means")
    check_samples("means", means, least=1)
    if variances is not None and variances.shape != means.shape:
        raise ValueError(f"variances: got shape {tuple(variances.shape)}, takes that of means, {tuple(means.shape)}")
    members = means.detach().to(dtype).reshape(len(means), means[0].numel())
    epistemic = (members - members.mean(dim=0)).square_().mean(dim=0) if len(members) > 1 else None
    if variances is None:
        return Decomposition(None, None, epistemic)
    aleatoric = variances.detach().to(arithmetic(variances, "variances")).mean(dim=0).reshape(-1)
    return Decomposition(aleatoric if epistemic is None else aleatoric + epistemic, aleatoric, epistemic)


def decompose(probabilities: Tensor) -> Decomposition:
    """Of one portion, (examples, samples, classes)."""
    total = entropy(probabilities.mean(dim=1))
    if probabilities.size(1) == 1:
        return Decomposition(total, None, None)
    aleatoric = entropy(probabilities).mean(dim=1)
    return Decomposition(total, aleatoric, (total - aleatoric).clamp(min=0))


def entropy(probabilities: Tensor) -> Tensor:
    """-Σ p log p over the last dimension, with 0 log 0 = 0."""
    sums: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return sums


def joined(parts: list[Decomposition], of: Tensor, dtype: torch.dtype) -> Decomposition:
    """The portions of (samples, ..., classes) as one; without an example, as empty as what it is of."""
    if not parts:
        nothing = torch.zeros(0, dtype=dtype, device=of.device)
        return Decomposition(nothing, *((None, None) if len(of) == 1 else (nothing, nothing)))
    columns = zip(*parts, strict=True)
    return Decomposition(*(None if column[0] is None else torch.cat(column) for column in columns))


def check_samples(name: str, x: Tensor, least: int) -> None:
    """Raise unless `x` has a sample to average over, and a class where there are to be some."""
    if x.dim() < least or len(x) == 0 or (least > 1 and x.size(-1) == 0):
        shape = "(samples, ..., classes)" if least > 1 else "(samples, ...)"
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes {shape} with at least one of each")
