"""Closed forms against scipy, and against what sampling the distributions gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics.uncertainty.reference import assert_near
from torchprobe.statistics import uncertainty

scipy_special = pytest.importorskip("scipy.special", reason="needs scipy")


def twin(alpha: list[float]) -> tuple[float, float, float]:
    """total, aleatoric, epistemic of one example, with scipy's digamma."""
    if not all(0 < a < math.inf for a in alpha):
        return (math.nan,) * 3
    evidence = math.fsum(alpha)
    mean = [a / evidence for a in alpha]
    total = -math.fsum(p * math.log(p) for p in mean if p > 0)
    digamma = scipy_special.digamma
    aleatoric = math.fsum(
        p * (digamma(evidence + 1) - digamma(a + 1)) for p, a in zip(mean, alpha, strict=True) if p > 0
    )
    return total, aleatoric, max(total - aleatoric, 0.0)


alphas = st.one_of(
    st.floats(1, 50),
    st.sampled_from((1.0, 1e-3, 1e6, 1e12, 1e-30, 0.0, -1.0, math.nan, math.inf)),
)


@given(
    rows=st.integers(1, 5).flatmap(lambda k: st.lists(st.lists(alphas, min_size=k, max_size=k), min_size=1)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    piece=st.sampled_from((1, 2**18)),
)
@settings(max_examples=200, deadline=None)
def test_dirichlet_is_that_of_the_twin(rows, dtype, piece, in_chunks_of):
    alpha = torch.tensor(rows, dtype=dtype)
    with in_chunks_of(piece):
        found = uncertainty.dirichlet(alpha)
        vacuity = uncertainty.vacuity(alpha)
    twins = [twin(row) for row in alpha.double().tolist()]
    for column, expected in zip(found, zip(*twins, strict=True), strict=True):
        assert_near(column, list(expected), 1e-7)
    shares = [len(row) / math.fsum(row) if all(0 < a < math.inf for a in row) else math.nan for row in rows]
    assert_near(vacuity, shares, 1e-6)


@given(
    rows=st.lists(st.tuples(alphas, alphas, alphas), max_size=8), dtype=st.sampled_from((torch.bfloat16, torch.float64))
)
@settings(max_examples=100, deadline=None)
def test_normal_inverse_gamma_is_that_of_the_formulas(rows, dtype):
    parameters = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).to(dtype)
    amini, meinert = [], []
    for nu, alpha, beta in parameters.double().tolist():
        proper = nu > 0 and alpha > 0 and beta > 0
        spread = beta / (alpha - 1) if proper and alpha > 1 else math.nan
        amini.append((spread + spread / nu if proper else math.nan, spread, spread / nu if proper else math.nan))
        student = (beta * (1 + nu) / (alpha * nu), 1 / nu) if proper else (math.nan, math.nan)
        meinert.append((amini[-1][0], *student))
    for convention, expected in (("amini", amini), ("meinert", meinert)):
        found = torch.stack(uncertainty.normal_inverse_gamma(*parameters.unbind(-1), convention), dim=-1).tolist()
        assert found == [pytest.approx(list(row), rel=1e-12, nan_ok=True) for row in expected]


def test_dirichlet_is_what_sampling_predictions_tends_to():
    alpha = torch.tensor([[1.5, 3.0, 0.7], [40.0, 2.0, 8.0]])
    drawn = torch.distributions.Dirichlet(alpha.double()).sample((100_000,))
    by_samples = uncertainty.classification(drawn)
    for closed, sampled in zip(uncertainty.dirichlet(alpha), by_samples, strict=True):
        torch.testing.assert_close(closed, sampled, atol=4e-3, rtol=0)


def test_without_evidence_nothing_is_known_and_with_much_nothing_is_epistemic():
    found = uncertainty.dirichlet(torch.tensor([[1.0, 1.0], [5e5, 5e5]]))
    torch.testing.assert_close(found.total, torch.full((2,), math.log(2), dtype=torch.float64))
    torch.testing.assert_close(found.epistemic, torch.tensor([math.log(2) - 0.5, 2.5e-7 * 2], dtype=torch.float64))
    vacuity = uncertainty.vacuity(torch.tensor([[1.0, 1.0], [9.0, 11.0]]))
    torch.testing.assert_close(vacuity, torch.tensor([1.0, 0.1], dtype=torch.float64))


def test_amini_is_the_variance_of_normals_drawn_from_the_distribution():
    nu, alpha, beta = torch.tensor([2.0]), torch.tensor([6.0]), torch.tensor([3.0])
    found = uncertainty.normal_inverse_gamma(nu, alpha, beta)
    variance = 1 / torch.distributions.Gamma(alpha.double(), beta.double()).sample((400_000,))
    mean = torch.randn(400_000, 1, dtype=torch.float64) * (variance / nu).sqrt()
    by_samples = uncertainty.regression(mean, variance)
    for closed, sampled in zip(found, by_samples, strict=True):
        torch.testing.assert_close(closed, sampled, rtol=0.02, atol=0)


def test_meinert_is_the_predictive_student_t():
    """Its degrees of freedom are 2 alpha; its variance is scale² df / (df - 2)."""
    nu, alpha, beta = torch.tensor([0.5]), torch.tensor([3.0]), torch.tensor([2.0])
    found = uncertainty.normal_inverse_gamma(nu, alpha, beta, convention="meinert")
    torch.testing.assert_close(found.aleatoric, (beta * (1 + nu) / (alpha * nu)).double())
    torch.testing.assert_close(found.epistemic, (1 / nu).double())
    student = torch.distributions.StudentT(2 * alpha.double(), scale=found.aleatoric.sqrt())
    torch.testing.assert_close(found.total, student.variance)
    torch.testing.assert_close(found.total, uncertainty.normal_inverse_gamma(nu, alpha, beta).total)


def test_parameters_out_of_range_are_not_finite():
    good, bad = torch.tensor([2.0]), torch.tensor([0.0, -1.0, math.nan])
    for parameters in ((bad, good, good), (good, bad, good), (good, good, bad)):
        for column in (c for how in ("amini", "meinert") for c in uncertainty.normal_inverse_gamma(*parameters, how)):
            assert column.isnan().all()
    edge = uncertainty.normal_inverse_gamma(good, torch.tensor([1.0]), good, "meinert")
    assert edge.total.isnan()
    assert edge.aleatoric == 3.0


def test_arguments_that_do_not_fit_are_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="convention='other': takes 'amini' or 'meinert'"):
        uncertainty.normal_inverse_gamma(one, one, one, "other")
    with pytest.raises(ValueError, match=r"alpha: got shape \(\), takes \(..., classes\)"):
        uncertainty.dirichlet(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"beta: got a tensor of torch.int64"):
        uncertainty.normal_inverse_gamma(one, one, one.long())
