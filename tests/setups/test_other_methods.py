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


class Attending(nn.Module):
    """Two attentions; `forward` does what `encode` and `decode` do, which train it."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.dec = nn.ModuleList([Queries(), nn.Linear(8, 8)])

    def encode(self, x, padded):
        return self.enc(x, x, tgt_key_padding_mask=padded)

    def decode(self, z):
        return self.dec[1](self.dec[0](z))

    def forward(self, x, padded):
        return self.decode(self.encode(x, padded))


class Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ x


def attended(call, every=1, act=lambda model, *given: None, lengths=(5, 5, 5)):
    """Values by tag and step."""
    torch.manual_seed(0)
    model, writer, alive = Attending(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    session = torchprobe.instrument(model, writer=writer, every=every)
    for _ in range(6):
        given = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor(lengths)[:, None]
        act(model, *given)
        out = call(model, *given)
        alive.append(weakref.ref(out))
        (out - given[0]).square().mean().backward()
        del out
        optimizer.step()
        optimizer.zero_grad()
    session.detach()
    assert [one() for one in alive] == [None] * 6
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    kinds = ("attention_", "activation_", "overview/loss")
    return {tag: dict(writer.scalars(tag)) for tag in writer.tags() if tag.startswith(kinds) and writer.scalars(tag)}


def by_methods(model, *given):
    return model.decode(model.encode(*given))


@pytest.mark.parametrize("every", [1, 3])
def test_attention_of_parts_is_that_of_the_model_from_the_second_sampled_step_on(every):
    found, expected = attended(by_methods, every), attended(Attending.__call__, every)
    assert {"attention_entropy/enc.self_attn", "attention_entropy/dec.0"} <= set(expected)
    for tag, values in expected.items():
        later = {step: value for step, value in values.items() if step > 1 or not tag.startswith("attention_")}
        assert found[tag] == pytest.approx(later, rel=1e-6), tag


def test_padding_that_a_part_is_given_is_left_out():
    found, expected = (attended(call, lengths=(5, 4, 2)) for call in (by_methods, Attending.__call__))
    for kind in ("entropy", "distance", "max_prob"):
        tag = f"attention_{kind}/enc.self_attn"
        assert found[tag] == pytest.approx({k: v for k, v in expected[tag].items() if k > 1}, rel=1e-6)


def test_attention_of_acting_by_parts_leaves_nothing():
    def act(model, x, padded):
        model.decode(model.encode(9 * x, padded))

    found, expected = (attended(by_methods, act=how)["attention_entropy/dec.0"] for how in (act, lambda *_: None))
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_part_that_is_called_beside_the_model_and_in_it_has_each_pass_once():
    def beside(model, *given):
        return by_methods(model, *given) + 0 * model(*given)

    found, expected = attended(beside), attended(Attending.__call__)
    for tag in ("activation_rms/enc.linear1", "activation_rms/dec.1", "attention_entropy/enc.self_attn"):
        steps = found[tag].keys()
        assert found[tag] == pytest.approx({step: expected[tag][step] for step in steps}, rel=1e-6)
        assert {2, 3, 4, 5, 6} <= steps


def test_in_evaluation_mode_training_by_methods_is_seen_from_the_second_step_on():
    model, writer, right = Encoder().eval(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=1, probes=[torchprobe.Activations()]) as session:
        for _ in range(4):
            x = torch.randn(5, 6)
            right.append(rms(model, x))
            optimizer.zero_grad()
            model.decode(model.encode(x)).square().mean().backward()
            optimizer.step()
    assert session.alerts == []
    assert dict(writer.scalars("activation_rms/down")) == pytest.approx(dict(enumerate(right[1:], 2)), rel=1e-5)


class Trained(nn.Module):
    """As a `training_step` that calls `self.net(x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x):
        return self.net(x)


def test_what_a_method_predicts_by_a_part_is_judged_as_what_the_model_does():
    torch.manual_seed(0)
    model, writer, right = Trained(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=1):
        for _ in range(4):
            optimizer.zero_grad()
            out, y = model.forward(torch.randn(40, 6)), torch.randint(0, 6, (40,))
            right.append((out.argmax(-1) == y).float().mean().item())
            nn.functional.cross_entropy(out, y).backward()
            optimizer.step()
    found = dict(writer.scalars("calibration/accuracy"))
    assert found == pytest.approx(dict(enumerate(right[1:], 2)))


class Deep(Encoder):
    """Its methods call what lies inside of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Encoder()

    def forward(self, x):
        return self.inner.up(torch.tanh(self.inner.down(x)))


def test_what_is_not_seen_of_a_model_whose_inner_parts_alone_are_called_is_said_with_the_way_out():
    model, writer = Deep(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.forward(torch.randn(5, 6)), torch.randint(0, 6, (5,))).backward()
            optimizer.step()
        session.flush()
        lines = [line for line in session.summary().splitlines() if "instrument the module that is called" in line]
    assert [any(probe in line for line in lines) for probe in ("Calibration", "Uncertainty")] == [True, True]


@pytest.mark.parametrize("has_forward", [True, False])
def test_the_first_batch_of_a_validation_by_parts_is_that_of_all_parts(has_forward):
    kind = Encoder if has_forward else type("Bare", (Encoder,), {"forward": nn.Module.forward})
    torch.manual_seed(0)
    model, writer, right = kind(), MemoryWriter(), {"down": {}, "up": {}}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=1, probes=[torchprobe.Activations()]):
        for step in range(1, 5):
            model.decode(model.encode(torch.randn(5, 6))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                for batch in range(3):
                    x = torch.randn(5, 6)
                    out = model.decode(model.encode(x))
                    if batch == 0:
                        right["down"][step] = rms(model, x)
                        right["up"][step] = out.double().square().mean().sqrt().item()
            model.train()
    for name, expected in right.items():
        found = dict(writer.scalars(f"val/activation_rms/{name}"))
        assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-5)
        assert set(found) >= {2, 3, 4}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
def test_a_part_that_is_a_script_is_passed_over():
    model, writer, right = Trained(), MemoryWriter(), []
    model.script = torch.jit.script(nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for _ in range(4):
            loss = model.script(model.net(torch.randn(4, 6))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right.append(loss.item())
    assert dict(writer.scalars("overview/loss")) == pytest.approx(dict(enumerate(right, 1)))
    assert "recording stopped" not in session.summary()
