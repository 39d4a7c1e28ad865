"""Calls of parts by a model's other methods: each is a pass, with all that a pass of the model has."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import torchprobe
from tests.setups.test_other_methods import Encoder, rms
from torchprobe.testing import MemoryWriter


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


def test_in_evaluation_mode_what_is_called_inside_of_parts_is_not_seen_and_why_is_said():
    model, writer = Deep().eval(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=1, probes=[torchprobe.Activations()]) as session:
        for _ in range(4):
            optimizer.zero_grad()
            model.forward(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
    said = [alert.message for alert in session.alerts if alert.rule == "nothing_captured"]
    assert said
    assert all("in evaluation mode, and neither it nor a part of it is called" in message for message in said)


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
