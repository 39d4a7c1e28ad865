"""What a reading says by itself becomes rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchprobe.capture.predictions.pool import Pool
from torchprobe.capture.predictions.reading import Reading
from torchprobe.capture.predictions.tally import Tally
from torchprobe.probes.evidence import SURE
from torchprobe.statistics import uncertainty
from torchprobe.statistics.uncertainty import Decomposition


def describe(tally: Tally, pool: Pool, reading: Reading, sample_dim: int | None) -> None:
    """Rows of everything but the plain tensor. Numbers with a variance go to the pool: their passes belong together."""
    where = pool.where
    if reading.named:
        tally.add(f"{SURE}||{where}", uncertainty.compute(Decomposition(*map(reading.named.get, uncertainty.KINDS))))
    if reading.alpha is not None:
        _describe_evidence(tally, where, reading)
    elif reading.variance is not None and not reading.named:
        _describe_variance(tally, pool, reading, sample_dim)
    for group, values in (("entropy", reading.entropy), ("kl", reading.kl)):
        if values is not None:
            tally.add(f"{SURE}|{group}|{where}", uncertainty.compute(Decomposition(values, None, None)))


def members_of(tensor: Tensor, sample_dim: int | None) -> Sequence[Tensor]:
    """The samples along a dimension; the tensor itself when there is none."""
    if sample_dim is None or not -tensor.dim() <= sample_dim < tensor.dim():
        return (tensor,)
    return tensor.unbind(sample_dim)


def _describe_evidence(tally: Tally, where: str, reading: Reading) -> None:
    assert reading.alpha is not None
    if reading.nu is not None and reading.beta is not None:
        found = uncertainty.normal_inverse_gamma(reading.nu, reading.alpha, reading.beta)
        tally.add(f"{SURE}||{where}", uncertainty.compute(found))
    elif reading.alpha.dim() and reading.alpha.shape[-1] > 1:
        tally.add(f"{SURE}||{where}", uncertainty.compute(uncertainty.dirichlet(reading.alpha)))
        vacuity = Decomposition(uncertainty.vacuity(reading.alpha), None, None)
        tally.add(f"{SURE}|vacuity|{where}", uncertainty.compute(vacuity))


def _describe_variance(tally: Tally, pool: Pool, reading: Reading, sample_dim: int | None) -> None:
    variance, spread = reading.variance, reading.spread_of_means
    assert variance is not None
    if spread is not None:  # a mixture tells its parts itself
        tally.add(f"{SURE}||{pool.where}", uncertainty.compute(Decomposition(variance, variance - spread, spread)))
    elif reading.mean is not None:
        pool.add_numbers(SURE, members_of(reading.mean, sample_dim), members_of(variance, sample_dim))
    else:
        tally.add(f"{SURE}||{pool.where}", uncertainty.compute(Decomposition(variance, variance, None)))
