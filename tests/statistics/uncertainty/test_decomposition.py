"""Uncertainty from several members: softmax first, mean after, per example."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics.predictions import probabilities
from tests.statistics.uncertainty import reference
from tests.statistics.uncertainty.reference import assert_near
from torchprobe.statistics import uncertainty


@given(p=probabilities(samples=True), piece=st.sampled_from((1, 16, 2**18)))
@settings(max_examples=200, deadline=None)
def test_classification_is_that_of_the_twin(p, piece, in_chunks_of):
    with in_chunks_of(piece):
        found = uncertainty.classification(p)
    assert found.total.dtype == (torch.float64 if p.dtype == torch.float64 else torch.float32)
    twins = [reference.classification(example) for example in reference.per_example(p)]
    assert_near(found.total, [twin[0] for twin in twins])
    if len(p) == 1:
        assert found.aleatoric is None
        assert found.epistemic is None
        return
    assert_near(found.aleatoric, [twin[1] for twin in twins])
    assert_near(found.epistemic, [twin[2] for twin in twins])
    assert not (found.epistemic < 0).any()


def test_members_that_disagree_are_epistemic_and_members_that_doubt_are_aleatoric():
    disagree = torch.eye(4)[:, None]  # four members, each sure of another class
    doubt = torch.full((4, 1, 4), 0.25)
    found = uncertainty.classification(torch.cat((disagree, doubt), dim=1))
    torch.testing.assert_close(found.total, torch.full((2,), math.log(4)))
    torch.testing.assert_close(found.epistemic, torch.tensor([math.log(4), 0.0]))
    torch.testing.assert_close(found.aleatoric, torch.tensor([0.0, math.log(4)]))


def test_mean_logits_are_not_the_mean_prediction():
    """Members whose logits cancel leave a uniform softmax of the mean: no epistemic part could be told from it."""
    x = torch.tensor([[[30.0, 0.0]], [[0.0, 30.0]], [[60.0, 0.0]]])
    found = uncertainty.classification(x.softmax(dim=-1))
    of_mean_logits = uncertainty.entropy(x.mean(dim=0).softmax(dim=-1))
    mean = torch.tensor([2 / 3, 1 / 3])
    torch.testing.assert_close(found.total, torch.special.entr(mean).sum()[None])
    torch.testing.assert_close(found.epistemic, found.total, atol=1e-6, rtol=0)
    assert of_mean_logits < 0.01  # the wrong way calls this prediction sure


def test_parameters_averaged_over_members_lose_what_these_disagree_on():
    """One normal of mean means and mean variances, as some libraries make of an ensemble, has no epistemic part."""
    means, variances = torch.tensor([[-3.0], [3.0]]), torch.full((2, 1), 0.5)
    found = uncertainty.regression(means, variances)
    assert found.epistemic == 9.0
    assert found.total == 9.5
    averaged = uncertainty.regression(means.mean(0, keepdim=True), variances.mean(0, keepdim=True))
    assert averaged.total == 0.5  # the wrong way is sure of a value that no member believes in
    assert averaged.epistemic is None


def test_epistemic_uncertainty_is_clamped_for_each_example_not_for_the_mean():
    """Rounding takes single examples below 0; they must not lower the mean of others."""
    p = torch.rand(1, 200, 50).softmax(dim=-1).repeat(3, 1, 1)
    found = uncertainty.classification(p)
    assert (found.total - found.aleatoric).min() < 0
    assert found.epistemic.min() == 0


@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(1, 5),
    shape=st.sampled_from([(), (0,), (7,), (3, 2)]),
    scale=st.sampled_from((1e-6, 1.0, 1e6)),
    offset=st.sampled_from((0.0, 1e3)),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
)
@settings(max_examples=200, deadline=None)
def test_regression_is_the_law_of_total_variance(seed, samples, shape, scale, offset, dtype):
    generator = torch.Generator().manual_seed(seed)
    means = (scale * torch.randn(samples, *shape, generator=generator) + offset).to(dtype)
    variances = (scale * torch.rand(samples, *shape, generator=generator)).to(dtype)
    found = uncertainty.regression(means, variances)
    aleatoric = variances.double().mean(dim=0).flatten()
    assert_near(found.aleatoric, aleatoric.tolist(), 1e-6)
    if samples == 1:
        assert found.epistemic is None
        assert_near(found.total, aleatoric.tolist(), 1e-6)
        return
    wide = means.double()
    epistemic = ((wide - wide.mean(dim=0)) ** 2).mean(dim=0).flatten()
    assert_near(found.epistemic, epistemic.tolist(), 1e-4)
    assert_near(found.total, (aleatoric + epistemic).tolist(), 1e-4)


def test_total_variance_is_that_of_the_mixture():
    """Drawn from the members in turn, values have the total variance."""
    means, variances = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    drawn = means + variances.sqrt() * torch.randn(2, 500_000)
    found = uncertainty.regression(means, variances)
    torch.testing.assert_close(drawn.flatten().var()[None], found.total, rtol=0.01, atol=0)


def test_what_predictions_do_not_tell_is_none():
    means = torch.randn(3, 4)
    assert uncertainty.regression(means).total is None
    assert uncertainty.regression(means).aleatoric is None
    assert uncertainty.regression(means).epistemic.shape == (4,)
    assert uncertainty.regression(means[:1]) == (None, None, None)


@pytest.mark.parametrize("shape", [(3,), (0, 4, 2), (3, 4, 0)])
def test_shapes_without_samples_or_classes_are_refused(shape):
    with pytest.raises(ValueError, match=r"got shape .* takes \(samples, ..., classes\)"):
        uncertainty.classification(torch.zeros(shape))


def test_other_arguments_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match=r"probabilities: got a tensor of torch.int64, takes a floating one"):
        uncertainty.classification(torch.ones(2, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"alpha: got shape \(3, 0\), takes \(..., classes\)"):
        uncertainty.dirichlet(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"variances: got shape \(2, 3\), takes that of means, \(2, 4\)"):
        uncertainty.regression(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"means: got shape \(\), takes \(samples, ...\)"):
        uncertainty.regression(torch.zeros(()))
