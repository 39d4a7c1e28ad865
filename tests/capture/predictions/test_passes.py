"""Several stochastic passes over one batch that share a loss: what is judged is what the loss is of, or nothing is."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import torchprobe
from torchprobe.capture.predictions import inputs
from torchprobe.testing import MemoryWriter

ROWS, CLASSES, STEPS = 48, 6, 3


def of_mean_probabilities(z: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(z.softmax(-1).mean(0).log(), y)


def of_mean_by_logsumexp(z: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(z.log_softmax(-1).logsumexp(0) - math.log(len(z)), y)


def of_mean_gathered(z: Tensor, y: Tensor) -> Tensor:
    return -z.softmax(-1)[:, torch.arange(ROWS), y].mean(0).log().mean()


def of_mean_logits(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.mean(0), y)


def of_each(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.repeat(len(z)))


NLL, CROSS_ENTROPY = nn.NLLLoss(), nn.CrossEntropyLoss()
TOGETHER = {
    "probabilities": of_mean_probabilities,
    "probabilities, by a loss module": lambda z, y: NLL(z.softmax(-1).mean(0).log(), y),
    "probabilities, by another one": lambda z, y: CROSS_ENTROPY(z.softmax(-1).mean(0).log(), y),
    "logsumexp": of_mean_by_logsumexp,
    "gathered": of_mean_gathered,
    "logits": of_mean_logits,
}
DECOYS = {
    "policy": lambda z, y: -(z.softmax(-1).mean(0).log()[torch.arange(ROWS), y] * _random(ROWS)).mean(),
    "squares": lambda z, y: (z.softmax(-1).mean(0) - F.one_hot(y, CLASSES)).square().mean(),
    "focal": lambda z, y: _focal(z.softmax(-1).mean(0)[torch.arange(ROWS), y]),
    "weights of passes": lambda z, y: sum(w * F.cross_entropy(a, y) for w, a in zip((0.5, 0.3, 0.2), z, strict=True)),
    "soft targets": lambda z, y: -(z.softmax(-1).mean(0).log() * _random(ROWS, CLASSES).softmax(-1)).sum(-1).mean(),
    "sum of logits": lambda z, y: F.cross_entropy(z.sum(0), y),
}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).exp()


def _focal(probability: Tensor) -> Tensor:
    return -((1 - probability) ** 2 * probability.log()).mean()


def run(loss_of, passes: int) -> tuple[MemoryWriter, list[Tensor], Tensor]:
    """A few steps of a network with dropout; the logits of each step's passes, and the targets."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Dropout(0.4), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,))
    writer, logits, probes = MemoryWriter(), [], [torchprobe.Calibration(), torchprobe.Uncertainty()]
    with torchprobe.instrument(model, writer=writer, probes=probes, every=1, rules=[]):
        for _ in range(STEPS):
            z = torch.stack([model(x) for _ in range(passes)])
            logits.append(z.detach().clone())
            optimizer.zero_grad()
            loss_of(z, y).backward()
            optimizer.step()
    return writer, logits, y


def expected(p: Tensor, y: Tensor) -> tuple[float, float]:
    """Negative log-likelihood and accuracy of the mean prediction."""
    nll = -p.double()[torch.arange(len(y)), y].log().mean().item()
    return nll, (p.argmax(-1) == y).double().mean().item()


@pytest.mark.parametrize("passes", [2, 3, 7])
@pytest.mark.parametrize("loss", TOGETHER.values(), ids=TOGETHER.keys())
def test_passes_whose_mean_enters_the_loss_are_one_prediction(loss, passes):
    writer, logits, y = run(loss, passes)
    for step, z in enumerate(logits, 1):
        p = z.double().softmax(-1)
        nll, accuracy = expected(p.mean(0), y)
        assert writer.value("calibration/nll", step) == pytest.approx(nll, rel=1e-5)
        assert writer.value("calibration/accuracy", step) == pytest.approx(accuracy)
        mean = p.mean(0)
        information = -(mean * mean.log()).sum(-1) + (p * p.log()).sum(-1).mean(0)
        assert writer.value("overview/epistemic", step) == pytest.approx(information.mean().item(), rel=1e-4)


@pytest.mark.parametrize("passes", [2, 3, 7])
def test_passes_with_a_loss_of_their_own_are_judged_each(passes):
    writer, logits, y = run(of_each, passes)
    for step, z in enumerate(logits, 1):
        nll, accuracy = expected(z.double().softmax(-1).flatten(0, 1), y.repeat(passes))
        assert writer.value("calibration/nll", step) == pytest.approx(nll, rel=1e-5)
        assert writer.value("calibration/accuracy", step) == pytest.approx(accuracy)


@pytest.mark.parametrize("loss", DECOYS.values(), ids=DECOYS.keys())
def test_other_losses_of_several_passes_name_no_target(loss):
    writer, *_ = run(loss, 3)
    assert not [tag for tag in writer.tags() if tag.startswith("calibration/")]


class Noisy(nn.Module):
    """Disturbs what it hears, by one generator or another."""

    def __init__(self, noise) -> None:
        super().__init__()
        self.net, self.noise = nn.Linear(5, CLASSES), noise
        self.generator = torch.Generator(torch.empty(0).device).manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.noise(x, self.generator))


NOISE = {
    "torch's": (lambda x, g: torch.randn_like(x), True),
    "its own": (lambda x, g: torch.randn(x.shape, generator=g), True),
    "none": (lambda x, g: torch.zeros_like(x), False),
}


@pytest.mark.parametrize(("noise", "members"), NOISE.values(), ids=NOISE)
def test_members_of_one_prediction_draw_random_numbers(noise, members):
    torch.manual_seed(3)
    model, writer = Noisy(noise), MemoryWriter()
    x, y, logits = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        for _ in range(2):
            logits = [model(x) for _ in range(3)]
            sum(F.cross_entropy(z, y) for z in logits).backward()
            optimizer.step()
    assert ("uncertainty_epistemic/root" in writer.tags()) is members
    if members:
        p = torch.stack(logits).detach().double().softmax(-1)
        epistemic = torch.special.entr(p.mean(0)).sum(-1).mean() - torch.special.entr(p).sum(-1).mean()
        assert writer.value("uncertainty_epistemic/root") == pytest.approx(epistemic.item(), rel=1e-3)


def test_a_view_made_anew_for_each_pass_is_the_same_input():
    torch.manual_seed(3)
    model, writer = nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.4), nn.Linear(32, CLASSES)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y, parts = torch.randn(2 * ROWS, 5), torch.randint(CLASSES, (ROWS,)), {}
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        for _ in range(2):
            parts = {start: [model(x[start : start + ROWS]) for _ in range(3)] for start in (0, ROWS)}
            sum(F.cross_entropy(z, y) for logits in parts.values() for z in logits).backward()
            optimizer.step()
    p = torch.stack([torch.stack(logits) for logits in parts.values()]).detach().double().softmax(-1)
    epistemic = torch.special.entr(p.mean(1)).sum(-1).mean() - torch.special.entr(p).sum(-1).mean()
    assert writer.value("uncertainty_epistemic/root") == pytest.approx(epistemic.item(), rel=1e-3)


def test_what_a_batch_norm_keeps_is_no_state_of_the_members():
    torch.manual_seed(3)
    body = nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Dropout(0.4), nn.Linear(32, CLASSES))
    optimizer, writer, logits = torch.optim.SGD(body.parameters(), lr=0.0), MemoryWriter(), []
    x, y = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,))
    with torchprobe.instrument(body, writer=writer, every=1, rules=[]):
        logits = [body(x) for _ in range(3)]
        sum(F.cross_entropy(z, y) for z in logits).backward()
        optimizer.step()
    p = torch.stack(logits).detach().double().softmax(-1)
    epistemic = torch.special.entr(p.mean(0)).sum(-1).mean() - torch.special.entr(p).sum(-1).mean()
    assert writer.value("uncertainty_epistemic/root") == pytest.approx(epistemic.item(), rel=1e-3)


def test_generators_need_no_weak_references(monkeypatch):
    """Those of torch 2.11 take none."""

    def only_of_others(x):
        assert not isinstance(x, torch.Generator)
        return weakref.ref(x)

    monkeypatch.setattr(inputs, "ref", only_of_others)
    test_members_of_one_prediction_draw_random_numbers(*NOISE["its own"])


class Remembering(Noisy):
    """Keeps options, and perhaps what it has said, in a namespace of its own."""

    def __init__(self, leak: float) -> None:
        super().__init__(NOISE["torch's"][0])
        self.state = SimpleNamespace(leak=leak, last=torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x) + self.state.leak * self.state.last
        if self.state.leak:
            self.state.last = z.detach()
        return z


@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_a_state_in_a_namespace_parts_passes(leak):
    torch.manual_seed(3)
    model, writer = Remembering(leak), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]) as session:
        x, y = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,))
        sum(F.cross_entropy(model(x), y) for _ in range(3)).backward()
        optimizer.step()
    assert ("uncertainty_epistemic/root" in writer.tags()) is not bool(leak)
    assert ("(state)" in session.summary()) is bool(leak)


class Policy(Noisy):
    def forward(self, x: Tensor) -> distributions.Categorical:
        return distributions.Categorical(logits=3 * super().forward(x))


def test_actions_sampled_from_a_distribution_that_the_model_returns_are_no_targets():
    model, writer = Policy(NOISE["none"][0]), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        for _ in range(3):
            law = model(torch.randn(ROWS, 5))
            (-law.log_prob(law.sample())).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not [tag for tag in writer.tags() if tag.startswith("calibration/")]


def test_members_that_draw_elsewhere_are_said():
    """By numpy: what differs may be a state of the model."""
    generator = np.random.default_rng(1)
    noise = lambda x, _: torch.from_numpy(generator.normal(size=tuple(x.shape))).to(x)  # noqa: E731 - as in NOISE
    model, writer = Noisy(noise), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]) as session:
        for _ in range(4):
            x, y = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,))
            sum(F.cross_entropy(model(x), y) for _ in range(3)).backward()
            optimizer.step()
    assert "uncertainty_epistemic/root" not in writer.tags()
    assert session.summary().count("drew no random numbers of torch") == 1
