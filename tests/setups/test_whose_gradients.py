"""Which of several optimizers a backward pass is for, where gradients run into nets that are not stepped."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from tests.setups.loops import batch, sgd
from torchprobe.testing import MemoryWriter

LOSS = "overview/loss"


def nets(number: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(number))


def test_an_optimizer_that_joins_has_nothing_of_what_was_zeroed_in_its_own_net_alone():
    """The generators' loss runs through both critics, each of which zeroes its own gradients before its turn."""
    model, writer, right = nets(3), MemoryWriter(), []
    generator, *critics = [sgd(net) for net in model]
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(6):
            fake = model[0](batch(k))
            losses = [(model[1](fake) - 1).square().mean() + (model[2](fake) - 1).square().mean()]
            generator.zero_grad()
            losses[0].backward()
            generator.step()
            for net, optimizer in zip(model[1:], critics, strict=True):
                optimizer.zero_grad()
                losses.append(net(batch(k)).square().mean() + net(fake.detach()).mean())
                losses[-1].backward()
                optimizer.step()
            right += [loss.item() for loss in losses]
    assert writer.scalars(LOSS) == [(step, pytest.approx(loss)) for step, loss in enumerate(right, 1)]


@pytest.mark.parametrize("every", [1, None])
def test_optimizers_that_are_made_anew_have_nothing_of_what_was_zeroed_in_one_net_alone(every):
    """As where a GAN grows: the generator's gradients of the stage before are still there, and the critic's are not."""
    model, writer, right = nets(2), MemoryWriter(), []
    with torchprobe.instrument(model, writer=writer, every=every):
        for _ in range(3):
            generator, critic = (sgd(net) for net in model)
            for k in range(6):
                fake = model[0](batch(k))
                critic.zero_grad()
                losses = [model[1](batch(k)).square().mean() + model[1](fake.detach()).mean()]
                losses[0].backward()
                critic.step()
                generator.zero_grad()
                losses.append((model[1](fake) - 1).square().mean())
                losses[1].backward()
                generator.step()
                right += [loss.item() for loss in losses]
    assert writer.scalars(LOSS) == [(step, pytest.approx(loss)) for step, loss in enumerate(right, 1)]


@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize("late", [0, 7], ids=["from the first step on", "some later"])
def test_nets_of_one_optimizer_that_are_trained_by_backward_passes_of_their_own(late, every):
    """Critics of an ensemble, and then the actor, whose optimizer has none of their losses."""
    model, writer, right = nn.ModuleDict({"actor": nets(1), "critics": nets(5)}), MemoryWriter(), []
    actor, critics = sgd(model.actor, lr=1e-2), sgd(model.critics, lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=every):
        for k in range(30):
            critics.zero_grad()
            trained = model.critics if k >= late else (model.critics[0], model.critics[4])
            losses = [critic(batch(k)).square().mean() for critic in trained]
            for loss in losses:
                loss.backward()
            critics.step()
            actor.zero_grad()
            losses.append(-model.critics[0](model.actor[0](batch(k))).mean())
            losses[-1].backward()
            actor.step()
            right += [sum(losses[:-1]).item(), losses[-1].item()]
    got = dict(writer.scalars(LOSS))
    assert got == pytest.approx({step: right[step - 1] for step in got}, rel=1e-5)
    missing = set(range(1, 61)) - set(got)
    assert missing <= ({2 * late + 1} if late else set())  # what no gradient tells for sure has no number


@pytest.mark.parametrize("micro", [1, 2])
def test_a_backward_pass_to_an_input_through_a_frozen_model_is_in_no_loss(micro):
    model, writer, right = nets(2), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(5):
            losses = []
            for n in range(micro):
                x = batch(2 * k + n).requires_grad_()
                model.requires_grad_(False)
                model[1](model[0](x)).square().mean().backward()
                model.requires_grad_(True)
                losses.append(model[1](model[0](x.detach() + 0.1 * x.grad.sign())).square().mean())
                losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            right.append(sum(losses).item())
    assert writer.scalars(LOSS) == [(step, pytest.approx(loss)) for step, loss in enumerate(right, 1)]
    assert writer.scalars("overview/skipped_steps")[-1][1] == 0
    assert session.step == 5


def a_way(draw: random.Random, nets: int) -> tuple[list[int], bool]:
    """Through which nets, and whether it is cut behind the first."""
    way = draw.sample(range(nets), draw.randint(1, nets))
    return way, len(way) > 1 and draw.random() < 0.4


def through(model: nn.ModuleList, way: list[int], cut: bool) -> Tensor:
    x = model[way[0]](torch.randn(3, 4))
    for i in way[1:]:
        x = model[i](x.detach() if cut and i == way[1] else x)
    return x.square().mean() + x.mean()


@pytest.mark.parametrize("seed", [36, 103, 135, 150])
def test_nets_in_any_order_under_optimizers_that_zero_their_own(seed):
    """Phases with ways through some nets, after which one or two optimizers step; gradients run into all nets."""
    draw, writer, right = random.Random(seed), MemoryWriter(), []
    model = nets(draw.choice((2, 3, 4)))
    order = draw.sample(range(len(model)), len(model))
    cuts = sorted({0, draw.randint(1, len(order)), len(order)})
    groups = [order[a:b] for a, b in pairwise(cuts)]
    optimizers = [sgd(nn.ModuleList(model[i] for i in group)) for group in groups]
    held: list[dict[int, float]] = [{} for _ in groups]
    phases = [[a_way(draw, len(model)) for _ in range(draw.choice((1, 2)))] for _ in range(draw.choice((2, 3)))]
    zeroing = [draw.choice(("own", "all", "none", "after")) for _ in phases]
    probes = [torchprobe.Loss(), torchprobe.Gradients()]
    with torchprobe.instrument(model, writer=writer, every=1, probes=probes, rules=[]):
        for number in range(5 * len(phases)):
            phase, zeroed = phases[number % len(phases)], zeroing[number % len(phases)]
            reached = [{*(way[1:] if cut else way)} for way, cut in phase]
            turn = [g for g, group in enumerate(groups) if any(reach & {*group} for reach in reached)][:2]
            for g in turn if zeroed == "own" else range(len(groups)) if zeroed == "all" else ():
                optimizers[g].zero_grad()
                held[g] = {}
            for n, (way, cut) in enumerate(phase):
                loss = through(model, way, cut)
                loss.backward()
                for g, group in enumerate(groups):
                    held[g] |= {10 * number + n: loss.item()} if reached[n] & {*group} else {}
            for g in turn:
                optimizers[g].step()
            right.append(sum({key: loss for g in turn for key, loss in held[g].items()}.values()))
            for g in turn if zeroed == "after" else ():
                optimizers[g].zero_grad()
                held[g] = {}
    assert [loss for _, loss in writer.scalars(LOSS)] == pytest.approx(right, rel=1e-5, abs=1e-6)
