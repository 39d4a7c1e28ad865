"""A loss that uses parameters beside the model's output: weights of its terms, a temperature, a head called afterwards.

Their gradients are there before a backward pass reaches the output. They tell nothing of whether gradients were zeroed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchprobe
from tests.setups.compiled import COMPILERS_WARNINGS
from tests.setups.reference import gradients, l2
from torchprobe.testing import MemoryWriter


class Weighted(nn.Module):
    """Kendall et al. 2018: tasks weighted by learnt variances, which the loss reads from the model."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(2))
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.auxiliary = nn.Linear(2, 1)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.head(self.body(x).tanh())

    def parts(self, x):
        return self.head(self.body(x).tanh())


def by_weights(model, call):
    y = call(torch.randn(5, 6))
    terms = y.square().mean(0) * torch.exp(-model.log_variance)
    return (terms + model.log_variance).sum() + model.temperature * y.mean()


def by_a_head(model, call):
    y = call(torch.randn(5, 6))
    return y.square().mean() + model.auxiliary(y).square().mean()


def trained(loss_of, *, none=True, micro=1, drops=False, apart=False, clip=False, method=False, steps=5, every=1):
    """What was recorded, and the loss and norm of each step."""
    torch.manual_seed(0)
    model, writer, right = Weighted(), MemoryWriter(), []
    beside = [model.log_variance, model.temperature] if apart else []
    others = [p for p in model.parameters() if not any(p is one for one in beside)]
    optimizers = [torch.optim.SGD(group, lr=0.1) for group in (beside, others) if group]
    session = torchprobe.instrument(model, writer=writer, every=every)
    for k in range(steps):
        call = model.parts if method is True or (method and k % 3 == 1) else model
        if drops and k == 2:
            loss_of(model, call).backward()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=none)
        losses = []
        for _ in range(micro):
            loss = loss_of(model, call)
            loss.backward()
            losses.append(loss.item())
        before = l2(*gradients(model).values())
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        right.append((sum(losses), before, l2(*gradients(model).values())))
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=none)
    session.detach()
    return writer, right, session


OPTIONS = [
    {},
    {"none": False},
    {"micro": 3},
    {"micro": 2, "none": False},
    {"drops": True},
    {"drops": True, "none": False},
    {"apart": True},
    {"apart": True, "micro": 2},
    {"clip": True},
    {"method": True},
    {"method": True, "micro": 2},
    {"method": "now and then"},
    {"method": "now and then", "micro": 3, "none": False},
]


@pytest.mark.parametrize("loss_of", [by_weights, by_a_head])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_that_of_its_step(loss_of, options):
    writer, right, session = trained(loss_of, **options)
    assert session.step == len(right)
    got = [dict(writer.scalars(tag)) for tag in ("overview/loss", "overview/grad_norm_unclipped", "overview/grad_norm")]
    for k, values in enumerate(right, 1):
        assert [one.get(k) for one in got] == pytest.approx(values, rel=1e-5), k
    assert [alert.rule for alert in session.alerts if alert.rule == "missing_zero_grad"] == []
    assert "left out" not in session.summary()


@pytest.mark.parametrize("loss_of", [by_weights, by_a_head])
@pytest.mark.parametrize("options", [one for one in OPTIONS if "apart" not in one], ids=str)
def test_it_is_also_where_few_steps_are_sampled(loss_of, options):
    """A head beside the output is listened at in sampled steps alone, and tells no other one whether all was zeroed."""
    writer, right, _ = trained(loss_of, steps=12, every=None, **options)
    got = dict(writer.scalars("overview/loss"))
    assert got == pytest.approx({k: values[0] for k, values in enumerate(right, 1)}, rel=1e-5)


def test_gradients_that_nobody_zeroes_still_add_up():
    torch.manual_seed(0)
    model, writer, losses = Weighted(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for _ in range(6):
            loss = by_weights(model, model)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
    sums = [sum(losses[: k + 1]) for k in range(6)]
    assert [value for _, value in writer.scalars("overview/loss")] == pytest.approx(sums, rel=1e-5)
    assert "missing_zero_grad" in [alert.rule for alert in session.alerts]


@pytest.mark.parametrize("uses_weights", [False, True])
@pytest.mark.parametrize("penalised", ["before the pass", "after the pass", "after backward", "never"])
@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=COMPILERS_WARNINGS)])
def test_a_penalty_on_such_a_parameter_is_part_of_the_loss(backend, penalised, uses_weights):
    """One that was not heard of in the first steps leaves their losses out; a compiler's own passes are none."""
    torch.manual_seed(0)
    model, writer, right = Weighted(), MemoryWriter(), []
    if backend is not None:
        model.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def penalise(when):
        if when == penalised:
            penalty = (model.log_variance - 1).square().sum()
            penalty.backward()
            right[-1] += penalty.item()

    with torchprobe.instrument(model, writer=writer):
        for _ in range(5):
            right.append(0.0)
            optimizer.zero_grad()
            penalise("before the pass")
            loss = by_weights(model, model) if uses_weights else model(torch.randn(5, 6)).square().mean()
            right[-1] += loss.item()
            penalise("after the pass")
            loss.backward()
            penalise("after backward")
            optimizer.step()
    got = dict(writer.scalars("overview/loss"))
    assert got == pytest.approx({k: right[k - 1] for k in got}, rel=1e-5)
    unheard = {"before the pass": {1, 2}, "after the pass": {1}}.get(penalised, set())
    assert set(range(1, 6)) - set(got) <= unheard


@pytest.mark.parametrize("none", [True, False])
def test_a_head_that_is_called_beside_the_output_only_later_changes_nothing(none):
    torch.manual_seed(0)
    model, writer, right = Weighted(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torchprobe.instrument(model, writer=writer, every=2):
        for k in range(8):
            y = model(torch.randn(5, 6))
            loss = y.square().mean() + (by_a_head(model, model) + model.log_variance.square().sum() if k > 3 else 0)
            optimizer.zero_grad(set_to_none=none)
            loss.backward()
            right.append(loss.item())
            optimizer.step()
    assert [value for _, value in writer.scalars("overview/loss")] == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("none", [True, False])
def test_gradients_left_by_an_optimizer_that_pauses_came_from_no_loss_beside_the_output(none):
    """An actor that steps every third time holds its gradients meanwhile, as TD3's does: they are no early ones."""
    torch.manual_seed(0)
    model, writer, losses = nn.ModuleDict({"actor": nn.Linear(4, 2), "critic": nn.Linear(6, 1)}), MemoryWriter(), []
    critic, actor = (torch.optim.Adam(model[name].parameters(), 1e-3) for name in ("critic", "actor"))

    def step(optimizer, loss):
        optimizer.zero_grad(set_to_none=none)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    with torchprobe.instrument(model, writer=writer, rules=[]):
        for k in range(1, 10):
            x = torch.randn(8, 4)
            action = model["actor"](x)
            step(critic, (model["critic"](torch.cat((x, action.detach()), 1)) - x[:, :1]).square().mean())
            if k % 3 == 0:
                step(actor, -model["critic"](torch.cat((x, model["actor"](x)), 1)).mean())
    assert [value for _, value in writer.scalars("overview/loss")] == pytest.approx(losses, rel=1e-6)
