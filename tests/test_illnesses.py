"""Healthy runs are silent; a planted illness is named within a sampled step, with its consequences and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.models import Transformer
from torchprobe.testing import MemoryWriter


def rules_fired(session) -> set[str]:
    return {alert.rule for alert in session.alerts}


def mlp_step(model):
    x = torch.randn(64, 8)
    return F.mse_loss(model(x), x.sum(1, keepdim=True))


def cnn_step(model):
    x = torch.randn(32, 1, 8, 8)
    return F.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long())


def gpt_step(model):
    ids = torch.randint(0, 11, (8, 16)).sort(-1).values
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def small_mlp():
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 2)
    )


def train(model, step, optimizer, steps, *, every=1, at=None, **options):
    """Trains; `at` maps a step to what happens before it."""
    with torchprobe.instrument(model, writer=MemoryWriter(), every=every, **options) as session:
        for number in range(1, steps + 1):
            if at and number in at:
                at[number]()
            loss = step(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.log_metrics({"loss": loss}, prefix="train")
    return session


@pytest.mark.parametrize("every", [1, 25])
@pytest.mark.parametrize(
    ("make", "step", "optimizer"),
    [
        (small_mlp, mlp_step, lambda p: torch.optim.AdamW(p, lr=1e-3)),
        (small_mlp, mlp_step, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
        (small_cnn, cnn_step, lambda p: torch.optim.SGD(p, lr=5e-2, momentum=0.9, weight_decay=5e-4)),
        (small_cnn, cnn_step, lambda p: torch.optim.Adam(p, lr=1e-3)),
        (lambda: Transformer(width=32), gpt_step, lambda p: torch.optim.AdamW(p, lr=3e-3)),
    ],
    ids=["mlp-adamw", "mlp-sgd", "cnn-sgd", "cnn-adam", "gpt-adamw"],
)
def test_a_healthy_run_is_silent(make, step, optimizer, every):
    model = make()
    session = train(model, step, optimizer(model.parameters()), 200, every=every)
    assert [str(alert) for alert in session.alerts] == []


def test_a_warm_up_from_zero_and_frozen_layers_are_healthy():
    model = small_mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))

    def step(model):
        if optimizer.state:
            scheduler.step()
        return mlp_step(model)

    assert [str(a) for a in train(model, step, optimizer, 20).alerts] == []


def test_a_learning_rate_far_too_high():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    session = train(model, mlp_step, optimizer, 16, at={10: lambda: optimizer.param_groups[0].update(lr=1e3)})
    assert session.alerts[0].step in (10, 11)
    assert {"exploding_gradient", "update_ratio"} <= rules_fired(session)
    assert rules_fired(session) <= {
        "exploding_gradient",
        "update_ratio",
        "non_finite",
        "dead_units",
        "vanishing_gradient",
    }


def test_spikes():
    model = small_mlp()
    spiky = [1.0]
    session = train(
        model, lambda m: mlp_step(m) * spiky[0], torch.optim.AdamW(model.parameters(), lr=1e-3), 140,
        at={135: lambda: spiky.__setitem__(0, 1000.0), 136: lambda: spiky.__setitem__(0, 1.0)},
    )  # fmt: skip
    begun = {(a.rule, a.step) for a in session.alerts if not a.ended}
    assert begun == {("loss_spike", 135), ("grad_norm_spike", 135), ("exploding_gradient", 135)}
    assert {(a.rule, a.step) for a in session.alerts if a.ended} == {(rule, 139) for rule, _ in begun}


def test_a_deep_stack_of_sigmoids():
    model = nn.Sequential(nn.Linear(8, 16), *[part for _ in range(20) for part in (nn.Sigmoid(), nn.Linear(16, 16))])
    session = train(model, lambda m: m(torch.randn(32, 8)).square().mean(), torch.optim.AdamW(model.parameters()), 1)
    alerts = session.alerts
    assert rules_fired(session) == {"vanishing_gradient"}
    assert {a.step for a in alerts} == {1}
    assert "0" in {a.where for a in alerts}
    assert "40" not in {a.where for a in alerts}


def test_relus_that_died():
    model = small_mlp()
    model[2].bias.data.fill_(-10.0)
    session = train(model, mlp_step, torch.optim.SGD(model.parameters(), lr=1e-3), 4)
    assert ("dead_units", 3, "3") in {(a.rule, a.step, a.where) for a in session.alerts}
    assert rules_fired(session) <= {"dead_units", "vanishing_gradient", "update_ratio"}  # nothing passes a dead layer


def test_few_inputs_are_gathered_before_units_are_called_dead():
    model = small_mlp()
    model[2].bias.data.fill_(-10.0)
    session = train(
        model, lambda m: m(torch.randn(8, 8)).sum(), torch.optim.SGD(model.parameters(), lr=0.0), 13,
        rules=["dead_units"], probes=[torchprobe.UnitActivity()],
    )  # fmt: skip
    assert [(a.step, a.where) for a in session.alerts] == [(12, "3")]


def permutation_step(model):
    ids = torch.stack([torch.randperm(11) for _ in range(8)])  # equal tokens would share the attention
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(("factor", "rule"), [(1e6, "attention_collapse"), (1e4, "attention_logit_growth")])
def test_attention_that_collapses_or_grows(factor, rule):
    model = Transformer(width=32, dropout=0.0)
    qkv = model.blocks[1].attention.qkv

    def grow():
        qkv.weight.data[:32] *= factor

    session = train(model, permutation_step, torch.optim.AdamW(model.parameters(), lr=1e-4), 4, at={4: grow})
    assert (rule, 4, "blocks.1.attention") in {(a.rule, a.step, a.where) for a in session.alerts}
    growth = {"update_ratio"}  # what is done to a parameter between two steps is part of the update
    assert rules_fired(session) <= {"attention_collapse", "attention_logit_growth"} | growth


@pytest.mark.parametrize("rate", [1e-12, 1e3])
def test_updates_that_are_tiny_or_huge(rate):
    model = small_mlp()
    session = train(model, mlp_step, torch.optim.SGD(model.parameters(), lr=rate), 1 if rate < 1 else 2)
    assert rules_fired(session) == {"update_ratio"}
    assert {a.threshold for a in session.alerts} == {1e-8 if rate < 1 else 10.0}


def test_overconfidence():
    model = small_cnn()
    with torchprobe.instrument(model, writer=MemoryWriter(), rules=["overconfidence"]) as session:
        probs = torch.tensor([[0.98, 0.02]]).repeat(1000, 1)
        session.log_predictions(probs, torch.arange(1000) % 2)
        session.next_step()
    assert rules_fired(session) == {"overconfidence"}
    assert session.alerts[0].value == pytest.approx(0.48, abs=1e-3)


def test_a_run_that_stands_still_and_goes_on():
    now = [0.0]
    rule = torchprobe.Stalled(clock=lambda: now[0])
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torchprobe.instrument(model, writer=MemoryWriter(), rules=[rule]) as session:
        for time in (0.0, 1000.0, 2801.0):
            now[0] = time
            session.flush()
            if time < 1000:
                mlp_step(model).backward()
                optimizer.step()
                session.flush()
                now[0] = 1001.0
                session.flush()
        assert [(a.step, a.ended) for a in session.alerts] == [(1, False)]
        mlp_step(model).backward()
        optimizer.step()
        session.flush()
        assert [a.ended for a in session.alerts] == [False, True]


def test_a_probe_that_was_asked_for_and_sees_nothing():
    model = small_mlp()
    session = train(model, mlp_step, torch.optim.SGD(model.parameters(), lr=1e-3), 4, probes=[torchprobe.Attention()])
    assert [(a.rule, a.step, a.where) for a in session.alerts] == [("nothing_captured", 3, "Attention")]


def test_stop_on_ends_the_loop_and_only_when_asked():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torchprobe.instrument(model, writer=MemoryWriter(), stop_on={"non_finite"}) as session:
        (mlp_step(model) * math.nan).backward()
        optimizer.step()
        session.flush()
        mlp_step(model).backward()
        with pytest.raises(torchprobe.TrainingAlert, match="non_finite"):
            optimizer.step()
        optimizer.step()
    assert session.step == 3
    assert session.alerts[0].step == 1
