"""`overview/loss` of models that are trained by other ways than their own call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from tests.setups.compiled import COMPILERS_WARNINGS
from tests.setups.test_second_backward import LOSS, batch
from torchprobe.testing import MemoryWriter


class Bare(nn.Module):
    """Trained by other ways than its own call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)

    def training_step(self, x: Tensor) -> Tensor:
        return self.forward(x).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def by_method(model: Bare) -> Callable[[Tensor], Tensor]:
    return model.training_step


def by_function(model: Bare) -> Callable[[Tensor], Tensor]:
    return lambda x: model.forward(x).square().mean()


def in_a_graph(model: Bare) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: model(x).square().mean(), backend="aot_eager")


def on_a_copy(model: Bare) -> Callable[[Tensor], Tensor]:
    skeleton = Bare().to("meta")
    parameters = dict(model.named_parameters())
    return lambda x: torch.func.functional_call(skeleton, parameters, (x,)).square().mean()


@pytest.mark.parametrize("way", [by_method, by_function, pytest.param(in_a_graph, marks=COMPILERS_WARNINGS), on_a_copy])
def test_the_loss_of_what_no_hook_on_the_model_hears_is_known_at_every_step(way):
    model, writer, right = Bare(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torchprobe.instrument(model, writer=writer):
        loss_of = way(model)
        for k in range(14):  # of which 1, 2, 5 and 10 are sampled
            optimizer.zero_grad()
            loss = loss_of(batch(k))
            loss.backward()
            optimizer.step()
            right.append(loss.item())
    got = dict(writer.scalars(LOSS))
    assert set(got) >= {2, *range(4, 15)}
    assert got == pytest.approx({step: right[step - 1] for step in got})


def test_hooks_on_parameters_stay_where_they_are_needed_and_are_not_put_on_again():
    model = Bare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    keys = []
    with torchprobe.instrument(model, writer=MemoryWriter()):
        loss_of = on_a_copy(model)
        for k in range(18):
            optimizer.zero_grad()
            loss_of(batch(k)).backward()
            optimizer.step()
            keys.append([key for p in model.parameters() for key in p._backward_hooks or ()])
    assert 0 < len(keys[14]) < 4  # of four parameters
    assert keys[14] == keys[15] == keys[16] == keys[17]
    assert all(p._backward_hooks is None for p in model.parameters())


class SoftActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.actor, self.critic = nn.Linear(6, 1), nn.Linear(1, 1)
        self.log_alpha = nn.Parameter(torch.tensor(-1.0))


@pytest.mark.parametrize("since", [0, 5, 20])
def test_a_temperature_with_an_optimizer_of_its_own_is_in_the_loss_of_the_step_that_it_shares_or_there_is_none(since):
    model, writer, right = SoftActorCritic(), MemoryWriter(), []
    parts = (model.critic.parameters(), model.actor.parameters(), [model.log_alpha])
    of_critic, of_actor, of_temperature = (torch.optim.SGD(part, lr=0.05) for part in parts)
    with torchprobe.instrument(model, writer=writer):
        for k in range(30):
            of_critic.zero_grad()
            loss = model.critic(batch(k)[:, :1].detach()).square().mean()
            loss.backward()
            of_critic.step()
            right.append(loss.item())
            of_actor.zero_grad()
            action = model.actor(batch(k))
            loss = (model.log_alpha.exp().detach() * action.square() - model.critic(action)).mean()
            loss.backward()
            of_actor.step()
            right.append(loss.item())
            if k >= since:
                of_temperature.zero_grad()
                loss = -(model.log_alpha.exp() * (action.detach() + 2)).mean()
                loss.backward()
                of_temperature.step()
                right[-1] += loss.item()
    got, begins = dict(writer.scalars(LOSS)), 2 * since + 2
    assert set(got) >= {*range(1, 61)} - ({begins, begins + 1} if since else set())
    assert got == pytest.approx({step: right[step - 1] for step in got})
