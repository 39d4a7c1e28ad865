"""Training through other methods of the model than `forward`, which no hook of the model itself sees."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


class Encoder(nn.Module):
    """Trained by `encode` and `decode`; `forward` is for use."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 3), nn.Linear(3, 6)

    def encode(self, x):
        return torch.tanh(self.down(x))

    def decode(self, z):
        return self.up(z)

    def forward(self, x):
        return self.decode(self.encode(x))


def rms(model, *inputs):
    """Of `down`'s outputs, in float64."""
    weight, bias = model.down.weight.detach().double(), model.down.bias.detach().double()
    out = torch.cat([x.double() @ weight.T + bias for x in inputs])
    return out.square().mean().sqrt().item()


def trained(steps, every, before=lambda model: None, also=lambda model: []):
    """Values of `activation_rms/down` by step, the right ones, and the session's model."""
    torch.manual_seed(0)
    model, writer, right = Encoder(), MemoryWriter(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=every, probes=[torchprobe.Activations()]):
        for _ in range(steps):
            before(model)
            x = torch.randn(5, 6)
            more = also(model)
            right.append(rms(model, x, *more))
            loss = (model.decode(model.encode(x)) - x).square().mean()
            for extra in more:
                loss = loss + model.encode(extra).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return dict(writer.scalars("activation_rms/down")), right, model


def used_by_forward(model):
    model.eval()
    with torch.no_grad():
        model(torch.randn(3, 6))
    model.train()


@pytest.mark.parametrize("before", [lambda model: None, used_by_forward], ids=["alone", "beside use by forward"])
@pytest.mark.parametrize("every", [1, 3])
def test_activations_of_training_are_exact(before, every):
    got, right, model = trained(7, every, before)
    sampled = [step for step in range(1, 8) if step == 1 or step % every == 0]
    assert sorted(got) == sampled
    assert [got[step] for step in sampled] == pytest.approx([right[step - 1] for step in sampled], rel=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


def test_calls_whose_gradients_are_not_used_leave_nothing():
    """Acting with gradients: the outputs are thrown away."""
    kept = []
    got, right, _ = trained(4, 1, lambda model: kept.append(model.encode(1e3 * torch.ones(2, 6)).sum()))
    assert [got[step] for step in range(1, 5)] == pytest.approx(right, rel=1e-5)


def test_several_calls_of_one_module_in_a_step_count_together():
    got, right, _ = trained(3, 1, also=lambda model: [torch.randn(5, 6), torch.randn(5, 6)])
    assert [got[step] for step in range(1, 4)] == pytest.approx(right, rel=1e-5)


def test_a_part_that_is_called_beside_the_model_counts_too():
    torch.manual_seed(1)
    model, writer, right = Encoder(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1, probes=[torchprobe.Activations()]):
        for _ in range(3):
            x, other = torch.randn(4, 6), torch.randn(4, 6)
            right.append(rms(model, x, other))
            (model(x).square().mean() + model.encode(other).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [value for _, value in writer.scalars("activation_rms/down")] == pytest.approx(right, rel=1e-5)


def test_graphs_of_calls_that_nobody_uses_are_not_kept_alive():
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.disable()
    try:
        with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
            alive = []
            for _ in range(5):
                acted = model.encode(torch.ones(2, 6))
                alive.append(weakref.ref(acted))
                del acted
                model.decode(model.encode(torch.ones(2, 6))).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert [one() for one in alive] == [None] * 5
    finally:
        gc.enable()


def test_the_loss_of_sampled_steps_is_written_and_nothing_untrue_is_said(caplog):
    torch.manual_seed(2)
    model, writer, losses = Encoder(), MemoryWriter(), []
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=4):
        for _ in range(16):
            x = torch.randn(5, 6)
            loss = (model.decode(model.encode(x)) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    found = dict(writer.scalars("overview/loss"))
    assert set(found) >= {1, 4, 8, 12, 16}
    assert found == pytest.approx({step: losses[step - 1] for step in found}, rel=1e-5)
    assert "Loss saw nothing" not in caplog.text


class Adversaries(nn.Module):
    """`forward` is the generator's; the critic is called by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Linear(3, 6), nn.Linear(6, 1)

    def forward(self, z):
        return self.generator(z)


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("every", [1, 7, None])
def test_optimizers_that_take_turns_have_the_same_steps_at_any_cadence(every, rounds):
    """The critic's turn has no pass of the model itself with gradients."""
    torch.manual_seed(3)
    model, writer, losses = Adversaries(), MemoryWriter(), []
    critic, generator = (torch.optim.SGD(part.parameters(), 0.05) for part in (model.critic, model.generator))
    with torchprobe.instrument(model, writer=writer, every=every) as session:
        for _ in range(36 // (rounds + 1)):
            for _ in range(rounds):
                with torch.no_grad():
                    fake = model(torch.randn(5, 3))
                losses.append(model.critic(fake).mean() - model.critic(torch.randn(5, 6)).tanh().mean())
                session.log_metrics({"before": len(losses)})
                critic.zero_grad()
                losses[-1].backward()
                critic.step()
            losses.append(-model.critic(model(torch.randn(5, 3))).tanh().mean())
            session.log_metrics({"before": len(losses)})
            generator.zero_grad()
            losses[-1].backward()
            generator.step()
        assert session.step == len(losses)
    assert writer.scalars("before") == [(step, step) for step in range(1, len(losses) + 1)]
    got = dict(writer.scalars("overview/loss"))
    assert got == pytest.approx({step: losses[step - 1].item() for step in got}, rel=1e-4)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("every", [4, None])
def test_what_is_logged_before_the_optimizer_steps_carries_its_step_at_any_cadence(every):
    model, writer = Encoder(), MemoryWriter()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=every) as session:
        for k in range(1, 25):
            x = torch.randn(5, 6)
            loss = (model.decode(model.encode(x)) - x).square().mean()
            session.log_metrics({"k": k})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert writer.scalars("k") == [(k, k) for k in range(1, 25)]


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def loss(self, x):
        return self.head(self.encoder(x)).square().mean()

    def forward(self, x):
        return self.head(x)


def test_parts_inside_of_a_fused_encoder_get_no_hook_that_stays():
    """One would turn off its fast path in evaluation, which changes what it computes for padding."""
    model = Fused()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=50):
        for _ in range(12):
            model.loss(torch.randn(2, 3, 8)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not any(m._forward_hooks for m in model.encoder.modules())
