"""What holds for every statistic of predictions: no host read, inputs and random state untouched, bounded memory."""

from __future__ import annotations

import pytest
import torch

from tests.modes import Largest, NoHostRead
from torchprobe.statistics import calibration, intervals, out_of_distribution, uncertainty

STATISTICS = {
    "classification": lambda x: uncertainty.compute(uncertainty.classification(x.softmax(-1))),
    "regression": lambda x: uncertainty.regression(x, x.square()).total,
    "dirichlet": lambda x: uncertainty.compute(uncertainty.dirichlet(x.exp())),
    "vacuity": lambda x: uncertainty.vacuity(x.exp()),
    "normal_inverse_gamma": lambda x: uncertainty.normal_inverse_gamma(x, x + 1, x.exp(), "meinert").total,
    "calibration": lambda x: calibration.compute(x, x[..., 0].long(), from_logits=True, uncertainty=x[..., 1]),
    "soft labels": lambda x: calibration.compute(x, x.softmax(-1), from_logits=True),
    "binary": lambda x: calibration.compute(x.sigmoid(), x > 0),
    "intervals": lambda x: intervals.compute(x, x.square(), x + 1),
    "separation": lambda x: out_of_distribution.compute(x, x + 1),
}


@pytest.fixture(params=STATISTICS.values(), ids=STATISTICS.keys())
def statistic(request):
    return request.param


@pytest.mark.parametrize("size", [16, 2**18])
def test_nothing_is_read_on_the_host(statistic, size, in_chunks_of):
    with in_chunks_of(size), NoHostRead():
        statistic(torch.randn(3, 4, 5))


def test_predictions_and_random_state_stay_as_they_were(statistic):
    x = torch.randn(3, 4, 5)
    before, state = x.clone(), torch.get_rng_state()
    statistic(x)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_results_have_no_graph(statistic):
    assert not statistic(torch.randn(3, 4, 5, requires_grad=True).requires_grad_()).requires_grad


def test_a_batch_is_judged_on_the_meta_device_too(statistic):
    """Where every value is unknown: no shape depends on one."""
    assert statistic(torch.empty(3, 4, 5, device="meta")).device.type == "meta"


@pytest.mark.parametrize("transposed", [False, True])
def test_large_logits_are_not_copied(transposed, in_chunks_of):
    logits = torch.randn(4, 64, 1000) if not transposed else torch.randn(4, 1000, 64).transpose(1, 2)
    targets = torch.randint(1000, (4, 64))
    with in_chunks_of(4000):
        for read in (
            lambda: uncertainty.classification(logits),
            lambda: calibration.compute(logits, targets, from_logits=True),
        ):
            with Largest() as largest:
                read()
            assert largest.elements <= 16_000, read
