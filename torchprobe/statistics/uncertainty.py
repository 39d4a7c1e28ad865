"""Uncertainty, split into what is in the data (aleatoric) and what the model does not know (epistemic).

The decompositions give a number an example, on the device: from the predictions of several members (an ensemble, or
passes with dropout), from evidential outputs in closed form. `compute` adds those numbers up to a row of
bounded length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.statistics.buckets import MAGNITUDES, magnitude_edges, magnitude_index, tally
from torchprobe.statistics.dtypes import arithmetic, examples, row_dtype


class Decomposition(NamedTuple):
    """Uncertainty of every example, (examples,) each; None is what the predictions do not tell.

    Entropies in nats, or variances in the squared unit of the target. An example with a prediction that is not
    finite has NaN or inf here.
    """

    total: Tensor | None
    aleatoric: Tensor | None
    epistemic: Tensor | None


KINDS = Decomposition._fields
"""total, aleatoric, epistemic."""

_HEADER = ("sum", "count", "nonfinite", "not_positive")
_WIDTH = len(_HEADER) + MAGNITUDES

FIELDS = tuple(f"{kind}_{name}" for kind in KINDS for name in (*_HEADER, *(f"bucket_{i}" for i in range(MAGNITUDES))))
"""Columns of a row, for each kind: the sum over its `count` finite examples, the number of the others, how many are 0
or less (where a differential entropy can be), and how many of the positive ones are in each bucket of `edges`."""

_LEAST_LOG = -800.0  # below that of any number but 0

edges = magnitude_edges


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
    _check_samples("probabilities", probabilities, least=2)
    members = probabilities.detach().movedim(0, -2)
    return _joined([_decompose(chunk.to(dtype)) for chunk in examples(members, 2)])


@torch.no_grad()
def regression(means: Tensor, variances: Tensor | None = None) -> Decomposition:
    """Variances of number predictions, from (samples, ...) means and predicted variances: law of total variance.

    aleatoric = E[σ²], epistemic = Var[μ] (of the samples as they are: divided by their number), total = their sum.
    Without variances only the epistemic part is known; from one sample only the aleatoric one, which is the total.
    Raises ValueError for shapes that differ and TypeError for integers.
    """
    dtype = arithmetic(means, "means")
    _check_samples("means", means, least=1)
    if variances is not None and variances.shape != means.shape:
        raise ValueError(f"variances: got shape {tuple(variances.shape)}, takes that of means, {tuple(means.shape)}")
    members = means.detach().to(dtype).reshape(len(means), means[0].numel())
    epistemic = (members - members.mean(dim=0)).square_().mean(dim=0) if len(members) > 1 else None
    if variances is None:
        return Decomposition(None, None, epistemic)
    aleatoric = variances.detach().to(arithmetic(variances, "variances")).mean(dim=0).reshape(-1)
    return Decomposition(aleatoric if epistemic is None else aleatoric + epistemic, aleatoric, epistemic)


@torch.no_grad()
def dirichlet(alpha: Tensor) -> Decomposition:
    """Entropies in nats of class predictions under Dirichlet(alpha): (..., classes), alpha = evidence + 1.

    With S the sum of alpha, p = alpha / S and psi the digamma function: total = H(p), aleatoric = E[H] =
    Σ p (psi(S + 1) - psi(alpha + 1)), epistemic = total - aleatoric, clamped at 0 (Malinin & Gales 2018). An example
    with an alpha that is not above 0 has NaN. In `row_dtype`, since the difference is small where evidence is large.
    Raises ValueError without a class and TypeError for integers.
    """
    return _joined([_of_concentrations(chunk) for chunk in _proper(alpha)])


@torch.no_grad()
def vacuity(alpha: Tensor) -> Tensor:
    """Classes / sum of alpha (Sensoy et al. 2018), (..., classes) -> (examples,): 1 without evidence, 0 with all."""
    return torch.cat([chunk.size(-1) / chunk.sum(dim=-1) for chunk in _proper(alpha)])


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


def entropy(probabilities: Tensor) -> Tensor:
    """-Σ p log p over the last dimension, with 0 log 0 = 0; NaN where a p is below 0. A fifth of the cost of `entr`."""
    terms = probabilities.log().clamp_(min=_LEAST_LOG).mul_(probabilities)
    sums: Tensor = terms.sum(dim=-1)
    return sums.neg_()


@torch.no_grad()
def compute(decomposition: Decomposition, among: Tensor | None = None) -> Tensor:
    """The row: shape (len(FIELDS),), `row_dtype`, on the device; zeros for a kind that is None. Makes no host read.

    among: flags in the values' shape, of those that count; all by default. Rows merge by addition. Raises ValueError
    when every kind is None, which has no device.
    """
    known = next((x for x in decomposition if x is not None), None)
    if known is None:
        raise ValueError("decomposition: got None for total, aleatoric and epistemic, takes at least one tensor")
    nothing = torch.zeros(_WIDTH, dtype=row_dtype(known.device), device=known.device)
    return torch.cat([nothing if values is None else _row(values, among) for values in decomposition])


def combine(a: Tensor, b: Tensor) -> Tensor:
    """The row of the examples of both."""
    return a + b


def summarise(row: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Means by kind, and `<kind>_nonfinite`, on the host; a kind without an example is left out."""
    means: dict[str, float] = {}
    for kind, (total, count, nonfinite, *_) in zip(KINDS, _by_kind(row), strict=True):
        if count:
            means[kind] = float(total / count)
        if count or nonfinite:
            means[f"{kind}_nonfinite"] = float(nonfinite)
    return means


def histograms(row: Sequence[float] | NDArray[np.float64]) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """By kind, edges and counts of the positive examples on a log10 axis; a kind without such is left out."""
    counts = {kind: part[len(_HEADER) :].astype(np.int64) for kind, part in zip(KINDS, _by_kind(row), strict=True)}
    return {kind: (edges(), of_kind) for kind, of_kind in counts.items() if of_kind.any()}


def _decompose(probabilities: Tensor) -> Decomposition:
    total = entropy(probabilities.mean(dim=1))
    if probabilities.size(1) == 1:
        return Decomposition(total, None, None)
    aleatoric = entropy(probabilities).mean(dim=1)
    return Decomposition(total, aleatoric, (total - aleatoric).clamp(min=0))


def _of_concentrations(alpha: Tensor) -> Decomposition:
    evidence = alpha.sum(dim=-1, keepdim=True)
    mean = alpha / evidence
    total = entropy(mean)
    aleatoric = (mean * (torch.digamma(evidence + 1) - torch.digamma(alpha + 1))).sum(dim=-1)
    return Decomposition(total, aleatoric, (total - aleatoric).clamp(min=0))


def _proper(alpha: Tensor) -> Iterator[Tensor]:
    """Chunks of examples in `row_dtype`; one that is no parameter of a Dirichlet distribution is NaN."""
    arithmetic(alpha, "alpha")
    if alpha.dim() == 0 or alpha.size(-1) == 0:
        raise ValueError(f"alpha: got shape {tuple(alpha.shape)}, takes (..., classes) with at least one class")
    for chunk in examples(alpha.detach(), 1):
        yield _where(((chunk > 0) & chunk.isfinite()).all(dim=-1, keepdim=True), chunk.to(row_dtype(alpha.device)))


def _where(condition: Tensor, value: Tensor) -> Tensor:
    return value.masked_fill(~condition, torch.nan)


def _joined(chunks: Sequence[Decomposition]) -> Decomposition:
    columns = zip(*chunks, strict=True)
    return Decomposition(*(None if column[0] is None else torch.cat(column) for column in columns))


def _row(values: Tensor, among: Tensor | None) -> Tensor:
    wide = values.detach().flatten().to(row_dtype(values.device))
    finite = wide.isfinite()
    others = ~finite
    if among is not None:
        chosen = among.flatten()
        finite, others = finite & chosen, others & chosen
    known = wide.where(finite, 0.0)
    positive = known > 0
    counts = tally(magnitude_index(known), MAGNITUDES, positive)[0]
    header = torch.stack((known.sum(), finite.sum(), others.sum(), (finite & ~positive).sum()))
    return torch.cat((header.to(counts.dtype), counts))


def _by_kind(row: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """The columns of each kind: (kinds, columns)."""
    values = np.asarray(row, dtype=np.float64)
    if values.shape != (len(FIELDS),):
        raise ValueError(f"row: got shape {values.shape}, takes ({len(FIELDS)},), as compute returns")
    return values.reshape(len(KINDS), _WIDTH)


def _check_samples(name: str, x: Tensor, least: int) -> None:
    """Raise unless `x` has a sample to average over, and a class where there are to be some."""
    if x.dim() < least or len(x) == 0 or (least > 1 and x.size(-1) == 0):
        shape = "(samples, ..., classes)" if least > 1 else "(samples, ...)"
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes {shape} with at least one of each")
