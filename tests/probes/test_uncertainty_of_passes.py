"""Plain outputs, and several passes over one input."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.probes.uncertain import Gives, bald, found, one_step, watch
from torchprobe.testing import MemoryWriter

# ---- plain outputs


def classifier(dropout: float = 0.5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 3))


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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_monte_carlo_dropout_in_validation_over_several_batches(mode):
    """With gradients too, where each pass's graph is gone before the next one runs."""
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
                    p = torch.stack([model(x).detach().softmax(-1) for _ in range(4)])
                    if step == 1:
                        expected.append(p.clone())
            model.train()
    p = torch.cat(expected, 1)
    assert found(writer, prefix="val/", step=2) == pytest.approx(bald(p), rel=1e-4)
    assert set(found(writer)) == {"total"}
    assert writer.value("val/overview/epistemic") == pytest.approx(bald(p)["epistemic"], rel=1e-4)


def test_the_mean_of_monte_carlo_passes_that_a_loss_module_judges():
    model, writer = classifier(), MemoryWriter()
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.NLLLoss()
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    with watch(model, writer):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            monte_carlo(model)
            p = torch.stack([model(x).softmax(-1) for _ in range(4)]).mean(0)
            criterion(p.log(), y)
    assert writer.value("val/calibration/nll") == pytest.approx(F.nll_loss(p.log(), y).item(), rel=1e-5)
    assert writer.value("val/calibration/count") == 16


def test_passes_of_a_regression_with_variances():
    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))

        def forward(self, x):
            mean, log_var = self.fc(x).unbind(-1)
            return {"mean": mean, "variance": log_var.exp()}

    model, writer = Gaussian(), MemoryWriter()
    x = torch.randn(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, writer):
        outs = [model(x) for _ in range(6)]
        sum(out["mean"].sum() for out in outs).backward()
        optimizer.step()
    mean, variance = torch.stack([o["mean"] for o in outs]), torch.stack([o["variance"] for o in outs])
    epistemic, aleatoric = mean.var(0, correction=0).mean().item(), variance.mean().item()
    expected = {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}
    assert found(writer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", ["loss module", "task"])
def test_passes_of_a_plain_regression_have_a_variance_of_their_means(how):
    model, writer = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)), MemoryWriter()
    x = torch.randn(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = nn.MSELoss() if how == "loss module" else F.mse_loss
    with watch(model, writer, task="regression" if how == "task" else None):
        outs = torch.stack([model(x) for _ in range(6)])
        loss(outs.mean(0), torch.randn(16, 1)).backward()
        optimizer.step()
    assert found(writer) == {"epistemic": pytest.approx(outs.var(0, correction=0).mean().item(), rel=1e-5)}
