"""What a model's outputs say about their uncertainty, in a loop that nothing was added to."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import torchprobe
from torchprobe.testing import MemoryWriter

KINDS = ("total", "aleatoric", "epistemic")


class Gives(nn.Module):
    """Returns what it is told to."""

    def __init__(self, give) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.give = give

    def forward(self, x: Tensor):
        return self.give(self.fc(x))


def watch(model: nn.Module, writer: MemoryWriter, **options) -> torchprobe.Session:
    probes = [torchprobe.Uncertainty(**options), torchprobe.Calibration()]
    return torchprobe.instrument(model, writer=writer, probes=probes, every=1)


def one_step(model: nn.Module, x: Tensor, **options) -> MemoryWriter:
    writer = MemoryWriter()
    with watch(model, writer, **options) as session, torch.no_grad():
        model(x)
        session.next_step()
    return writer


def found(writer: MemoryWriter, where: str = "root", prefix: str = "", step: int | None = None) -> dict[str, float]:
    tags = {kind: f"{prefix}uncertainty_{kind}/{where}" for kind in KINDS}
    return {kind: writer.value(tag, step) for kind, tag in tags.items() if tag in writer.tags()}


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
    "dataclass": (lambda h: Both(z, 2 * z), {"epistemic": z.mean(), "aleatoric": 2 * z.mean()}),
    "named tuple": (lambda h: Named(z, z), {"epistemic": (z * z).mean(), "aleatoric": z.exp().mean()}),
    "model output": (lambda h: Output(logvar=z), {"aleatoric": z.exp().mean(), "total": z.exp().mean()}),
    "nested": (lambda h: {"head": {"uncertainty": z}}, {"total": z.mean()}),
    "entropy": (lambda h: {"predictive_entropy": z[:, 0]}, {"total": z[:, 0].mean()}),
    "std": (lambda h: {"mu": z, "sigma": z}, {"aleatoric": (z * z).mean(), "total": (z * z).mean()}),
    "log std": (lambda h: {"log_std": z}, {"aleatoric": (2 * z).exp().mean(), "total": (2 * z).exp().mean()}),
    "bfloat16": (lambda h: {"var": z.bfloat16()}, {"aleatoric": z.mean(), "total": z.mean()}),
    "one number": (lambda h: {"epistemic": z.mean()}, {"epistemic": z.mean()}),
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


def test_evidence_for_classes_is_a_dirichlet_distribution():
    evidence = torch.rand(6, 3) * 5
    writer = one_step(Gives(lambda h: {"evidence": evidence}), torch.randn(6, 4))
    samples = distributions.Dirichlet(evidence + 1).sample((40_000,))
    total = torch.special.entr(samples.mean(0)).sum(-1).mean().item()
    aleatoric = torch.special.entr(samples).sum(-1).mean().item()
    assert found(writer) == pytest.approx(
        {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}, rel=0.02
    )
    assert writer.value("uncertainty_vacuity/root") == pytest.approx((3 / (evidence + 1).sum(-1)).mean().item())


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


def test_a_mixture_tells_its_parts():
    weights, means = torch.rand(5, 3).softmax(-1), torch.randn(5, 3)
    std = torch.rand(5, 3) + 0.5
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(probs=weights), distributions.Normal(means, std)
    )
    writer = one_step(Gives(lambda h: mixture), torch.randn(5, 4))
    centre = (weights * means).sum(-1, keepdim=True)
    epistemic = (weights * (means - centre).square()).sum(-1).mean().item()
    aleatoric = (weights * std.square()).sum(-1).mean().item()
    expected = {"total": epistemic + aleatoric, "aleatoric": aleatoric, "epistemic": epistemic}
    assert found(writer) == pytest.approx(expected, rel=1e-5)


def test_a_dirichlet_distribution_and_one_without_a_variance():
    alpha = torch.rand(5, 3) + 1
    assert set(found(one_step(Gives(lambda h: distributions.Dirichlet(alpha)), torch.randn(5, 4)))) == set(KINDS)
    uniform = distributions.TransformedDistribution(
        distributions.Uniform(torch.zeros(5), torch.ones(5)), distributions.SigmoidTransform()
    )
    assert found(one_step(Gives(lambda h: uniform), torch.randn(5, 4))) == {}


# ---- plain outputs


def classifier(dropout: float = 0.5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 3))


def bald(p: Tensor) -> dict[str, float]:
    """From (members, batch, classes) probabilities, in float64."""
    p = p.detach().double()
    total = torch.special.entr(p.mean(0)).sum(-1)
    aleatoric = torch.special.entr(p).sum(-1).mean(0)
    return {
        "total": total.mean().item(),
        "aleatoric": aleatoric.mean().item(),
        "epistemic": (total - aleatoric).clamp(min=0).mean().item(),
    }


def test_a_plain_regression_output_gets_no_entropy_and_the_log_says_which_option_settles_it(caplog):
    model, writer = nn.Linear(4, 3), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, writer), caplog.at_level(logging.WARNING, "torchprobe"):
        for _ in range(4):
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 3)).backward()
            optimizer.step()
    assert found(writer) == {}
    assert any("Uncertainty(task='classification')" in record.getMessage() for record in caplog.records)


def test_what_a_plain_output_is_can_be_said():
    x = torch.randn(8, 4)
    model = nn.Linear(4, 3)
    entropy = torch.special.entr(model(x).softmax(-1)).sum(-1).mean().item()
    assert found(one_step(model, x, task="classification")) == {"total": pytest.approx(entropy)}


def test_an_ambiguous_output_is_not_guessed_at_and_the_log_says_which_option_settles_it(caplog):
    model, writer = Gives(lambda h: torch.stack([h, h + 1, h - 1])), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = torch.randint(0, 4, (3 * 8,))
    with watch(model, writer), caplog.at_level(logging.WARNING, "torchprobe"):
        for _ in range(3):
            F.cross_entropy(model(torch.randn(8, 4)).flatten(0, 1), y).backward()
            optimizer.step()
    assert found(writer) == {}
    assert any("Uncertainty(sample_dim=0)" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("sample_dim", [0, 1, -2])
@pytest.mark.parametrize("loss", ["of each member", "of the mean"])
def test_samples_along_a_declared_dimension(sample_dim, loss):
    parts = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 5)])

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(*parts)

        def forward(self, x):
            return torch.stack([part(x) for part in self.parts], sample_dim)

    model, writer = Stacked(), MemoryWriter()
    x, y = torch.randn(16, 4), torch.randint(0, 5, (16,))
    with watch(model, writer, sample_dim=sample_dim) as session:
        out = model(x).movedim(sample_dim, 0)
        if loss == "of each member":
            F.cross_entropy(out.flatten(0, 1), y.repeat(3)).backward()
        else:
            F.nll_loss(out.softmax(-1).mean(0).log(), y).backward()
        session.next_step()
    p = out.softmax(-1)
    assert found(writer) == pytest.approx(bald(p), rel=1e-4)
    accuracy = (p.mean(0).argmax(-1) == y).float().mean().item()
    assert writer.value("calibration/accuracy") == pytest.approx(accuracy)
    assert writer.value("calibration/count") == 16


# ---- several passes


@pytest.mark.parametrize("backward", ["each", "together"])
def test_passes_over_one_input_are_members_of_one_prediction(backward):
    model, writer = classifier(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    for _ in range(2):
        p = []
        with watch(model, writer):
            losses = []
            for _ in range(5):
                out = model(x)
                p.append(out.softmax(-1))
                losses.append(F.cross_entropy(out, y) / 5)
                if backward == "each":
                    losses.pop().backward()
            if losses:
                torch.stack(losses).sum().backward()
            optimizer.step()
        assert found(writer) == pytest.approx(bald(torch.stack(p)), rel=1e-4)
        assert writer.value("calibration/count") == 5 * 16


def test_passes_over_different_inputs_are_not():
    model, writer = classifier(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    entropy = []
    with watch(model, writer):
        for k in range(3):
            x = torch.randn(16, 4)
            if k == 2:
                x = x.clone()
            out = model(x)
            entropy.append(torch.special.entr(out.softmax(-1)).sum(-1).mean().item())
            (F.cross_entropy(out, torch.randint(0, 3, (16,))) / 3).backward()
        optimizer.step()
    assert found(writer) == {"total": pytest.approx(sum(entropy) / 3, rel=1e-5)}


def test_an_input_that_was_changed_in_place_is_another_one():
    model, writer = classifier(), MemoryWriter()
    x = torch.randn(16, 4)
    with watch(model, writer, task="classification") as session, torch.no_grad():
        model(x)
        x += 1
        model(x)
        session.next_step()
    assert set(found(writer)) == {"total"}


def test_an_optimizer_that_evaluates_the_model_again_changes_the_weights_in_between():
    model, writer = nn.Linear(4, 3), MemoryWriter()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with watch(model, writer):
        optimizer.step(closure)
    assert set(found(writer)) == {"total"}


def monte_carlo(model: nn.Module) -> nn.Module:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    return model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_monte_carlo_dropout_in_validation_over_several_batches(mode):
    model, writer = classifier(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watch(model, writer):
        for step in range(2):
            x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monte_carlo(model)
            with mode():
                for _ in range(3):
                    x = torch.randn(10, 4)
                    p = torch.stack([model(x).softmax(-1) for _ in range(4)])
                    if step == 1:
                        expected.append(p.clone())
            model.train()
    p = torch.cat(expected, 1)
    assert found(writer, prefix="val/", step=2) == pytest.approx(bald(p), rel=1e-4)
    assert set(found(writer)) == {"total"}
    assert writer.value("val/overview/epistemic") == pytest.approx(bald(p)["epistemic"], rel=1e-4)


def test_the_mean_of_monte_carlo_passes_that_a_loss_module_judges():
    model, writer = classifier(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    with watch(model, writer):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            monte_carlo(model)
            p = torch.stack([model(x).softmax(-1) for _ in range(4)]).mean(0)
            nn.NLLLoss()(p.log(), y)
    assert writer.value("val/calibration/nll") == pytest.approx(F.nll_loss(p.log(), y).item(), rel=1e-5)
    assert writer.value("val/calibration/count") == 16


def test_passes_of_a_regression_with_variances():
    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))

        def forward(self, x):
            mean, log_var = self.fc(x).unbind(-1)
            return {"mean": mean, "log_var": log_var}

    model, writer = Gaussian(), MemoryWriter()
    x = torch.randn(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, writer):
        outs = [model(x) for _ in range(6)]
        sum(out["mean"].sum() for out in outs).backward()
        optimizer.step()
    mean, variance = torch.stack([o["mean"] for o in outs]), torch.stack([o["log_var"].exp() for o in outs])
    epistemic, aleatoric = mean.var(0, correction=0).mean().item(), variance.mean().item()
    expected = {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}
    assert found(writer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", ["loss module", "task"])
def test_passes_of_a_plain_regression_have_a_variance_of_their_means(how):
    model, writer = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)), MemoryWriter()
    x = torch.randn(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, writer, task="regression" if how == "task" else None):
        outs = torch.stack([model(x) for _ in range(6)])
        loss = nn.MSELoss() if how == "loss module" else F.mse_loss
        loss(outs.mean(0), torch.randn(16, 1)).backward()
        optimizer.step()
    assert found(writer) == {"epistemic": pytest.approx(outs.var(0, correction=0).mean().item(), rel=1e-5)}


# ---- ensembles and other parts


class Ensemble(nn.Module):
    def __init__(self, give: str) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(4, 3) for _ in range(4))
        self.give = give

    def forward(self, x):
        out = torch.stack([member(x) for member in self.members])
        return {"logits": out.mean(0), "probabilities": out.softmax(-1).mean(0), "stacked": out}[self.give]


@pytest.mark.parametrize("give", ["logits", "probabilities"])
def test_an_ensemble_inside_the_model(give):
    model, writer = Ensemble(give), MemoryWriter()
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    with watch(model, writer) as session:
        out = model(x)
        (F.cross_entropy(out, y) if give == "logits" else F.nll_loss(out.log(), y)).backward()
        session.next_step()
    p = torch.stack([member(x) for member in model.members]).softmax(-1)
    assert found(writer, "members") == pytest.approx(bald(p), rel=1e-4)
    q = out.softmax(-1) if give == "logits" else out
    assert writer.value("calibration/nll") == pytest.approx(F.nll_loss(q.log(), y).item(), rel=1e-5)


def test_layers_and_heads_are_no_ensemble():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return torch.cat([head(x) for head in self.heads], -1)

    model, writer = Layers(), MemoryWriter()
    with watch(model, writer) as session:
        F.cross_entropy(model(torch.randn(16, 4)), torch.randint(0, 6, (16,))).backward()
        session.next_step()
    assert {tag.split("/")[1] for tag in writer.tags() if tag.startswith("uncertainty_")} == {"root"}


def test_modules_that_are_asked_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Gives(lambda h: {"mean": h, "variance": h.square()})

        def forward(self, x):
            return self.head(x)["mean"]

    model = Model()
    x = torch.randn(8, 4)
    writer = one_step(model, x, modules="he*")
    assert found(writer, "head")["total"] == pytest.approx(model.head.fc(x).square().mean().item())
    assert found(writer) == {}


def test_a_divergence_beside_the_output_of_bayesian_layers():
    class BayesianLinear(nn.Linear):
        def kl_loss(self):
            return self.weight.square().sum()

        def forward(self, x):
            return super().forward(x), self.kl_loss()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = BayesianLinear(4, 3)

        def forward(self, x):
            return self.fc(x)

    model, writer = Model(), MemoryWriter()
    expected = model.fc.kl_loss().item()
    y = torch.randint(0, 3, (16,))
    with watch(model, writer) as session:
        out, kl = model(torch.randn(16, 4))
        (F.cross_entropy(out, y) + 1e-3 * kl).backward()
        session.next_step()
    assert writer.value("uncertainty_kl/root") == pytest.approx(expected)
    assert set(found(writer)) == {"total"}
    assert writer.value("calibration/count") == 16


def test_a_loss_beside_the_output_is_no_divergence():
    writer = one_step(Gives(lambda h: (h, h.mean())), torch.randn(8, 4))
    assert "uncertainty_kl/root" not in writer.tags()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sample_dim": "first"}, TypeError, "sample_dim='first'"),
        ({"task": "ranking"}, ValueError, "task='ranking'.*'classification'"),
        ({"modules": [3]}, TypeError, "modules: got 3"),
        ({"every": 0}, ValueError, "every=0"),
    ],
)
def test_wrong_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        torchprobe.Uncertainty(**options)
