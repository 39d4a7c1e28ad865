"""Several optimizers over one model: what belongs to one step."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from torch import nn

import torchprobe
from tests.setups.loops import TOTAL, TwoParts, batch, loss_of, net, sgd, steps, train_step, values
from tests.setups.reference import gradients, l2, parameters
from torchprobe.testing import MemoryWriter


def test_two_optimizers_after_one_backward_are_one_step_from_the_first_iteration_on():
    model, writer = net(), MemoryWriter()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(vectors, lr=1e-3)]
    expected, norms = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            model.zero_grad()
            loss_of(model, k).backward()
            expected.append(gradients(model))
            for optimizer in optimizers:
                optimizer.step()
            norms.append(l2(*parameters(model).values()))
            session.log_metrics({"k": k + 1})
            assert session.step == k + 1
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(l2(*g.values()))) for k, g in enumerate(expected)]
    for name in expected[0]:
        assert values(writer, f"grad_norm/{name}") == pytest.approx([l2(g[name]) for g in expected])
        assert steps(writer, f"update_ratio/{name}") == [1, 2, 3]
    assert values(writer, "overview/param_norm") == pytest.approx(norms)
    assert steps(writer, "lr/SGD/group_0") == steps(writer, "lr/AdamW/group_0") == [1, 2, 3]
    assert writer.scalars("k") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_step_one_shows_both_optimizers_at_any_cadence():
    model, writer = net(), MemoryWriter()
    optimizers = [sgd(model[0]), sgd(model[2])]
    with torchprobe.instrument(model, writer=writer, every=100) as session:
        for k in range(3):
            model.zero_grad()
            loss_of(model, k).backward()
            if k == 0:
                expected = l2(*gradients(model).values())
            for optimizer in optimizers:
                optimizer.step()
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(1, pytest.approx(expected))]
    assert steps(writer, "update_ratio/0.weight") == steps(writer, "update_ratio/2.weight") == [1]


def gan_iteration(model: TwoParts, critic, generator, session, n_critic: int = 1) -> dict[str, list[torch.Tensor]]:
    """An iteration of a GAN: what both used, in the order of use."""
    used: dict[str, list[torch.Tensor]] = {"critic": [], "generator": []}
    for _ in range(n_critic):
        critic.zero_grad()
        fake = model.generator(torch.randn(5, 3)).detach()
        (model.critic(fake).mean() - model.critic(torch.randn(5, 4)).mean()).backward()
        used["critic"].append(l2(*gradients(model.critic).values()))
        critic.step()
        session.log_metrics({"critic": len(used["critic"])}, prefix="loss")
    generator.zero_grad()
    (-model.critic(model.generator(torch.randn(5, 3))).mean()).backward()
    used["generator"].append(l2(*gradients(model.generator).values()))
    session.log_metrics({"generator": 1}, prefix="loss")
    generator.step()
    return used


def test_a_gan_iteration_is_two_steps_from_the_first_on():
    """Each optimizer has passes of its own, and a step begins with the first pass after an optimizer has stepped."""
    model, writer = TwoParts(), MemoryWriter()
    critic = torch.optim.AdamW(model.critic.parameters())
    generator = torch.optim.AdamW(model.generator.parameters())
    used = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            used.append(gan_iteration(model, critic, generator, session))
            assert session.step == 2 * (k + 1)
    odd, even = [1, 3, 5], [2, 4, 6]
    for tag, at, norms in (
        ("grad_norm_layer/critic", odd, [u["critic"][0] for u in used]),
        ("grad_norm_layer/generator", even, [u["generator"][0] for u in used]),
        (TOTAL, odd + even, [u["critic"][0] for u in used] + [u["generator"][0] for u in used]),
    ):
        assert writer.scalars(tag) == [(k, pytest.approx(n)) for k, n in sorted(zip(at, norms, strict=True))], tag
    for tag, at in (
        ("lr/AdamW/group_0", odd),
        ("loss/critic", odd),
        ("lr/AdamW_1/group_0", even),
        ("loss/generator", even),
        ("activation_mean/generator", even),  # nothing runs back through what it makes for the critic
        ("activation_mean/critic", odd + even),
    ):
        assert steps(writer, tag) == sorted(at), tag


def test_five_critic_steps_to_a_generator_step_are_six_steps_an_iteration():
    model, writer = TwoParts(), MemoryWriter()
    critic = torch.optim.SGD(model.critic.parameters(), lr=0.1)
    generator = torch.optim.SGD(model.generator.parameters(), lr=0.1)
    critic_norms, generator_norms = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for _ in range(4):
            used = gan_iteration(model, critic, generator, session, n_critic=5)
            critic_norms += used["critic"]
            generator_norms += used["generator"]
        assert session.step == 24
    of_generator = [6, 12, 18, 24]
    of_critic = [step for step in range(1, 25) if step not in of_generator]
    assert writer.scalars("grad_norm_layer/critic") == [
        (k, pytest.approx(n)) for k, n in zip(of_critic, critic_norms, strict=True)
    ]
    assert writer.scalars("grad_norm_layer/generator") == [
        (k, pytest.approx(n)) for k, n in zip(of_generator, generator_norms, strict=True)
    ]
    assert steps(writer, "lr/SGD/group_0") == of_critic


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("old", ["deleted", "kept"])
def test_an_optimizer_replaced_midway_goes_on_counting(old, first):
    model, writer, keep = net(), MemoryWriter(), []
    optimizer = torch.optim.AdamW(model.parameters())
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        expected += [train_step(model, optimizer, k) for k in range(first)]
        if old == "kept":
            keep.append(optimizer)
        del optimizer
        gc.collect()
        optimizer = sgd(model)
        expected += [train_step(model, optimizer, k) for k in range(first, 15)]
        assert session.step == 15
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(norm)) for k, norm in enumerate(expected)]
    assert steps(writer, "lr/AdamW/group_0") == list(range(1, first + 1))
    assert steps(writer, "lr/SGD/group_0") == list(range(first + 1, 16))


def test_validation_after_training_is_over_still_belongs_to_the_last_step():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(2):
            train_step(model, optimizer, k)
        del optimizer
        gc.collect()
        model.eval()
        for k in range(3):
            with torch.no_grad():
                model(batch(k))
        assert session.step == 2
    assert steps(writer, "val/activation_mean/0") == [2]


class Heads(nn.Module):
    """A trunk, and a head for each task."""

    def __init__(self, tasks: int = 5) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(tasks))

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        return self.heads[task](self.trunk(x).tanh())


def test_an_optimizer_that_joins_has_all_micro_batches_of_its_step():
    model, writer = TwoParts(), MemoryWriter()
    first, second = sgd(model.generator), sgd(model.critic)
    with torchprobe.instrument(model, writer=writer, every=1):
        train_step_of(model.generator, first, width=3)
        outputs, losses = [], []
        for k in range(3):  # the first of these came while no optimizer of theirs was known
            outputs.append(model.critic(batch(k)))
            losses.append(outputs[-1].square().mean())
            losses[-1].backward()
        second.step()
    mean = torch.cat(outputs).double().mean().item()
    assert writer.value("overview/loss", 2) == pytest.approx(sum(loss.item() for loss in losses))
    assert writer.value("activation_mean/critic", 2) == pytest.approx(mean)


def train_step_of(part: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> None:
    part(batch(width=width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_that_steps_every_third_time_has_the_losses_since_it_was_zeroed():
    model, writer, losses = net(), MemoryWriter(), []
    often, seldom = sgd(model[0]), sgd(model[2])
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(6):
            loss = loss_of(model, k)
            loss.backward()
            losses.append(loss.item())
            often.step()
            often.zero_grad()
            if k % 3 == 2:
                seldom.step()
                seldom.zero_grad()
    expected = [sum(losses[k - 2 : k + 1]) if k % 3 == 2 else losses[k] for k in range(6)]
    assert values(writer, "overview/loss") == pytest.approx(expected)


def test_heads_that_take_turns_under_an_optimizer_of_their_own():
    model, writer, expected = Heads(), MemoryWriter(), []
    trunk, heads = sgd(model.trunk), sgd(model.heads)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(10):
            model.zero_grad()
            output = model(batch(k), (2 * k) % 5)
            loss = output.square().mean()
            loss.backward()
            heads.step()
            if k < 2:
                trunk.step()
            expected.append((loss.item(), output.double().mean().item()))
    assert writer.scalars("overview/loss") == [(k, pytest.approx(loss)) for k, (loss, _) in enumerate(expected, 1)]
    for k, (_, mean) in enumerate(expected):
        assert writer.value(f"activation_mean/heads.{(2 * k) % 5}", k + 1) == pytest.approx(mean)


class Parts(nn.Module):
    def __init__(self, parts: int, shared: bool) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4) if shared else nn.Identity()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(parts))

    def forward(self, x: torch.Tensor, part: int) -> torch.Tensor:
        return self.parts[part](self.trunk(x))


def a_round(model: Parts, draw: random.Random) -> list[tuple[int, torch.Tensor]]:
    """Backward passes through some of the parts: their numbers and losses."""
    some = [part for part in range(len(model.parts)) if draw.random() < 0.8] or [0]
    draw.shuffle(some)
    losses = [
        (part, model(torch.randn(3, 4), part).square().mean()) for part in some for _ in range(draw.choice((1, 2)))
    ]
    for _, loss in losses:
        loss.backward()
    return losses


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "over one trunk"])
@pytest.mark.parametrize("seed", range(8))
def test_parts_that_train_and_step_in_any_order(seed, shared):
    """The loss is of what an optimizer's gradients are of, from the first step on, when no optimizer is known yet."""
    torch.manual_seed(seed)
    draw, writer, expected = random.Random(seed), MemoryWriter(), []
    model = Parts(draw.choice((2, 3)), shared)
    groups = [*model.parts, *([model.trunk] if shared else [])]
    optimizers, unzeroed = [sgd(group) for group in groups], [{} for _ in groups]
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Loss()], rules=[]):
        for k in range(6):
            fresh = a_round(model, draw)
            reached = [{part, len(groups) - 1} if shared else {part} for part, _ in fresh]
            for i in range(len(groups)):
                unzeroed[i] |= {(k, n): fresh[n][1].item() for n, parts in enumerate(reached) if i in parts}
            steps = [i for i in range(len(groups)) if any(i in parts for parts in reached) and draw.random() < 0.6]
            for i in steps:
                optimizers[i].step()
            if steps:
                expected.append(sum({key: loss for i in steps for key, loss in unzeroed[i].items()}.values()))
            for i in steps if draw.random() < 0.5 else range(len(groups)):
                optimizers[i].zero_grad()
                unzeroed[i] = {}
    assert values(writer, "overview/loss") == pytest.approx(expected)


@pytest.mark.parametrize("zeroed", [False, True])
def test_optimizers_with_closures_without_passes_are_steps_of_one_loss_unless_it_is_zeroed(zeroed):
    """As Lightning has them, optimised by hand: each step counts, with a closure that does nothing."""
    model, writer, expected = net(), MemoryWriter(), []
    first, second = sgd(model[0]), sgd(model[2])
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            losses = [loss_of(model, 2 * k + n) for n in range(2)]
            for loss in losses:
                loss.backward()
            total = sum(loss.item() for loss in losses)
            first.step(lambda: None)
            if zeroed:
                second.zero_grad()
            second.step(lambda: None)
            model.zero_grad()
            expected += [(2 * k + 1, total)] if zeroed else [(2 * k + 1, total), (2 * k + 2, total)]
    assert writer.scalars("overview/loss") == [(step, pytest.approx(loss)) for step, loss in expected]
