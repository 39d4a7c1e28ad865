"""What a model's outputs say about their uncertainty, in a loop that nothing was added to."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, distributions

from tests.probes.uncertain import KINDS, Gives, found, one_step, watch
from torchprobe.testing import MemoryWriter

# ---- named outputs


@dataclasses.dataclass
class Both:
    epistemic: Tensor
    aleatoric: Tensor


class Named(NamedTuple):
    epistemic_std: Tensor
    log_aleatoric: Tensor


class Output(collections.OrderedDict):
    """What HuggingFace models return."""


z = torch.tensor([[0.5, 1.0, 1.5, 2.0], [1.0, 2.0, 3.0, 4.0]])
NAMED = {
    "dataclass": (lambda h: Both(z, 2 * z), {"epistemic": z.mean(), "aleatoric": 2 * z.mean(), "total": 3 * z.mean()}),
    "named tuple": (
        lambda h: Named(z, z),
        {"epistemic": (z * z).mean(), "aleatoric": z.exp().mean(), "total": (z * z + z.exp()).mean()},
    ),
    "model output": (lambda h: Output(variance=z), {"aleatoric": z.mean(), "total": z.mean()}),
    "nested": (lambda h: {"head": {"uncertainty": z}}, {"total": z.mean()}),
    "of data and model": (
        lambda h: {"data_uncertainty": z, "modelUncertainty": 2 * z},
        {"aleatoric": z.mean(), "epistemic": 2 * z.mean(), "total": 3 * z.mean()},
    ),
    "of data": (
        lambda h: {"data_uncertainty": z, "data": z, "model_entropy": 0 * z},
        {"aleatoric": z.mean(), "total": 0 * z.mean()},
    ),
    "entropy": (lambda h: {"predictive_entropy": z[:, 0]}, {"total": z[:, 0].mean()}),
    "negative": (lambda h: {"variance": z - 1}, {}),
    "negative of another name": (lambda h: {"uncertainty": z - 1, "epistemic": 1 - z}, {}),
    "rounded below 0": (lambda h: {"epistemic": z - 0.5 - 1e-6}, {"epistemic": (z - 0.5).mean()}),
    "of labelled tokens": (
        lambda h: {"entropy": z * (z < 2), "label_mask": z < 2, "loss": z.sum()},
        {"total": z[z < 2].mean()},
    ),
    "of all, beside a mask": (lambda h: {"entropy": z, "mask": (z < 2).float()}, {"total": z.mean()}),
    "beside a mask of what is left out": (
        lambda h: {"entropy": z * (z < 2), "mask": z >= 2},
        {"total": (z * (z < 2)).mean()},
    ),
    "beside a mask of another shape": (lambda h: {"entropy": z, "mask": z[0] > 0}, {"total": z.mean()}),
    "an entropy of numbers": (lambda h: {"entropy": z - 3}, {"total": (z - 3).mean()}),
    "scores": (lambda h: {"uncertainty_logits": z}, {}),
    "bfloat16": (lambda h: {"var": z.bfloat16()}, {"aleatoric": z.mean(), "total": z.mean()}),
    "one number": (lambda h: {"epistemic": z.mean()}, {"epistemic": z.mean()}),
    "one number alone": (lambda h: {"variance": z.mean()}, {"aleatoric": z.mean(), "total": z.mean()}),
    "of one example": (
        lambda h: {"mean": h[0, 0], "variance": z.mean(), "loss": z.sum()},
        {"aleatoric": z.mean(), "total": z.mean()},
    ),
    "terms of a loss": (lambda h: dict.fromkeys(("loss", "invariance", "variance", "cov", "entropy"), z.mean()), {}),
    "explained": (lambda h: {"explained_variance": z}, {}),
    "no uncertainty": (lambda h: {"attention_entropy": z, "kl_loss": z.sum(), "variable": z, "hidden": z}, {}),
}


@pytest.mark.parametrize("kind", NAMED)
def test_fields_are_taken_as_what_they_are_called(kind):
    give, expected = NAMED[kind]
    writer = one_step(Gives(give), torch.randn(2, 4))
    assert found(writer) == {name: pytest.approx(value.item(), rel=1e-5) for name, value in expected.items()}


def test_the_overview_and_the_histograms_of_every_examples_value():
    writer = one_step(Gives(lambda h: Both(z, 2 * z)), torch.randn(2, 4))
    assert writer.value("overview/epistemic") == pytest.approx(z.mean().item())
    assert writer.value("overview/aleatoric") == pytest.approx(2 * z.mean().item())
    histogram = writer.histograms("uncertainty_epistemic_histogram/root")[0][1]
    assert histogram.counts.sum() == z.numel()
    (bins,) = histogram.counts.nonzero()
    assert histogram.edges[bins[0]] <= math.log10(0.5) <= histogram.edges[bins[0] + 1]


def test_values_that_are_not_finite_are_counted():
    bad = z.clone()
    bad[0, 0] = math.nan
    writer = one_step(Gives(lambda h: {"epistemic": bad}), torch.randn(2, 4))
    assert writer.value("uncertainty_epistemic/root") == pytest.approx(bad[~bad.isnan()].mean().item())
    assert writer.value("uncertainty_epistemic_nonfinite/root") == 1


def trained(model, loss_of) -> tuple[MemoryWriter, str]:
    """Two steps, and the summary."""
    writer, optimizer = MemoryWriter(), torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, writer) as session:
        for _ in range(2):
            loss_of(model(torch.ones(6, 4))).backward()
            optimizer.step()
    return writer, session.summary()


MEAN, TARGET = torch.randn(6, 4), torch.randn(6, 4)
GUESSES = {
    "logvar": lambda z: z.exp(),
    "log_std": lambda z: (2 * z).exp(),
    "sigma": lambda z: z.square(),
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSES)
def test_names_of_other_things_too_count_once_a_likelihood_confirms_them(name):
    source = torch.rand(6, 4) + 0.5
    model = Gives(lambda h: {"mu": MEAN + 0 * h, name: source + 0 * h})
    likelihood, variance = torch.nn.functional.gaussian_nll_loss, GUESSES[name](source).mean().item()
    writer, _ = trained(model, lambda out: likelihood(out["mu"], TARGET, GUESSES[name](out[name])))
    assert found(writer) == {"aleatoric": pytest.approx(variance), "total": pytest.approx(variance)}
    writer, summary = trained(model, lambda out: out["mu"].square().mean() + out[name].square().mean())
    assert found(writer) == {}
    assert f"the model returns {name}" in summary


def test_evidence_for_classes_is_a_dirichlet_distribution_once_its_likelihood_is_trained():
    evidence, y = torch.rand(6, 3) * 5, torch.tensor([0, 1, 2, 0, 1, 2])
    model = Gives(lambda h: {"evidence": evidence + 0 * h[:, :3]})

    def evidential(out):  # the expected cross-entropy (Sensoy et al. 2018)
        alpha = out["evidence"] + 1
        return (alpha.sum(-1).digamma() - alpha.gather(-1, y[:, None])[:, 0].digamma()).mean()

    writer, _ = trained(model, evidential)
    samples = distributions.Dirichlet(evidence + 1).sample((40_000,))
    total = torch.special.entr(samples.mean(0)).sum(-1).mean().item()
    aleatoric = torch.special.entr(samples).sum(-1).mean().item()
    assert found(writer) == pytest.approx(
        {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}, rel=0.02
    )
    assert writer.value("uncertainty_vacuity/root") == pytest.approx((3 / (evidence + 1).sum(-1)).mean().item())
    writer, summary = trained(model, lambda out: out["evidence"].square().mean())
    assert found(writer) == {}
    assert "the model returns evidence" in summary


def student(out):
    """Of a normal-inverse-gamma distribution, whose field is called otherwise than nu (as `lmbda`)."""
    a, b, k = out["alpha"] + 1, out["beta"], out["lmbda"]
    return -distributions.StudentT(2 * a, TARGET, (b * (1 + k) / (k * a)).sqrt()).log_prob(MEAN).mean()


LIKELIHOODS = {
    "a gamma distribution's": lambda out: -distributions.Gamma(out["alpha"], out["beta"]).log_prob(MEAN.exp()).mean(),
    "a beta distribution's": lambda out: -distributions.Beta(out["alpha"], out["beta"]).log_prob(MEAN.sigmoid()).mean(),
    "a normal-inverse-gamma distribution's": student,
}


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_an_alpha_of_another_distribution_of_several_numbers_is_no_evidence_for_classes(kind):
    model = Gives(lambda h: {name: 1 + h.exp() for name in ("alpha", "beta", "lmbda")})
    writer, summary = trained(model, LIKELIHOODS[kind])
    assert found(writer) == {}
    assert "the model returns alpha" in summary


def test_a_penalty_on_evidence_for_wrong_classes_confirms_it_too():
    """Sensoy et al. 2018: the divergence from no evidence, without that of the right class."""
    y = torch.nn.functional.one_hot(torch.arange(6) % 4, 4)

    def penalised(out):
        alpha = y + (1 - y) * out["alpha"]
        none = distributions.Dirichlet(torch.ones(6, 4))
        return distributions.kl_divergence(distributions.Dirichlet(alpha), none).mean()

    writer, _ = trained(Gives(lambda h: {"alpha": 1 + h.exp()}), penalised)
    assert set(found(writer)) == set(KINDS)


def test_normal_inverse_gamma():
    nu, alpha, beta = torch.rand(3, 8, 1) + 1.5
    fields = {"gamma": torch.randn(8, 1), "nu": nu, "alpha": alpha, "beta": beta}
    writer = one_step(Gives(lambda h: fields), torch.randn(8, 4))
    aleatoric, epistemic = (beta / (alpha - 1)).mean().item(), (beta / (nu * (alpha - 1))).mean().item()
    expected = {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}
    assert found(writer) == pytest.approx(expected, rel=1e-4)


# ---- distributions


def test_a_normal_distribution_is_of_the_observed_value():
    std = torch.rand(5, 4) + 0.5
    writer = one_step(Gives(lambda h: distributions.Independent(distributions.Normal(h, std), 1)), torch.randn(5, 4))
    variance = std.square().mean().item()
    assert found(writer) == pytest.approx({"total": variance, "aleatoric": variance})
    entropy = distributions.Normal(0.0, std).entropy().mean().item()
    assert writer.value("uncertainty_entropy/root") == pytest.approx(entropy)
    assert "observed" in writer.records[-1].descriptions["uncertainty_total"]


@pytest.mark.parametrize("together", [dict, lambda **laws: tuple(laws.values())])
def test_of_several_distributions_the_first_is_read_and_said_to_be_so(together):
    std = torch.rand(5, 4) + 0.5

    def laws(h):
        return together(value=distributions.Normal(h, std), policy=distributions.Categorical(logits=h))

    writer = one_step(Gives(laws), torch.randn(5, 4))
    assert found(writer)["total"] == pytest.approx(std.square().mean().item())
    assert "first of 2" in writer.records[-1].descriptions["uncertainty_total"]


def test_a_joint_normal_distribution_is_read_point_by_point():
    factor = torch.randn(3, 3).tril() + 3 * torch.eye(3)
    joint = distributions.MultivariateNormal(torch.zeros(3), scale_tril=factor)
    writer = one_step(Gives(lambda h: joint), torch.randn(2, 4))
    assert found(writer)["total"] == pytest.approx(joint.variance.mean().item())


@pytest.mark.parametrize("kind", [distributions.Categorical, distributions.OneHotCategorical, distributions.Bernoulli])
def test_distributions_over_classes_have_an_entropy(kind):
    given = []
    model = Gives(lambda h: given.append(kind(logits=h)) or given[-1])
    writer = one_step(model, torch.randn(5, 4))
    assert found(writer) == {"total": pytest.approx(given[0].entropy().mean().item())}


def test_the_parts_of_a_mixture_are_no_members():
    weights, means = torch.rand(5, 3).softmax(-1), torch.randn(5, 3)
    std = torch.rand(5, 3) + 0.5
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(probs=weights), distributions.Normal(means, std)
    )
    writer = one_step(Gives(lambda h: mixture), torch.randn(5, 4))
    variance = mixture.variance.mean().item()
    assert found(writer) == pytest.approx({"total": variance, "aleatoric": variance}, rel=1e-5)


def test_a_dirichlet_distribution_and_one_without_a_variance():
    alpha = torch.rand(5, 3) + 1
    assert set(found(one_step(Gives(lambda h: distributions.Dirichlet(alpha)), torch.randn(5, 4)))) == set(KINDS)
    uniform = distributions.TransformedDistribution(
        distributions.Uniform(torch.zeros(5), torch.ones(5)), distributions.SigmoidTransform()
    )
    assert found(one_step(Gives(lambda h: uniform), torch.randn(5, 4))) == {}


def test_a_distribution_without_a_variance_is_said_to_be_one():
    law = distributions.TransformedDistribution(distributions.Normal(0.0, 1.0), [distributions.SigmoidTransform()])
    model = Gives(lambda h: law)
    with watch(model, MemoryWriter()) as session:
        for _ in range(4):
            model(torch.randn(5, 4))
    assert "of which torch knows no variance" in session.summary()
