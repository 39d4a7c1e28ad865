"""Which parameters have tags: some come and go, some are shared, some are left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import torchprobe
from tests.setups.loops import batch, net, one_step, steps
from tests.setups.reference import l2, wide
from torchprobe.testing import MemoryWriter


def test_a_layer_frozen_midway_has_no_gradient_from_then_on():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    totals = []
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(4):
            if k == 2:
                model[0].requires_grad_(False)
            totals.append(l2(*one_step(model, optimizer, model(batch(k)).square().mean()).values()))
    assert steps(writer, "grad_norm/0.weight") == [1, 2]
    assert steps(writer, "grad_norm/2.weight") == [1, 2, 3, 4]
    assert [total for _, total in writer.scalars("overview/grad_norm")] == pytest.approx(totals)
    assert [ratio for _, ratio in writer.scalars("update_ratio/0.weight")][2:] == [0.0, 0.0]


@pytest.mark.parametrize("in_place", [False, True], ids=["zeroed", "zeroed in place"])
def test_parts_of_one_optimizer_that_are_frozen_in_turn_are_trained_at_every_step(in_place):
    model, writer, losses = net(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(12):
            model[0].requires_grad_(k // 3 % 2 == 0)
            model[2].requires_grad_(k // 3 % 2 == 1)
            optimizer.zero_grad(set_to_none=not in_place)
            loss = model(batch(k)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert writer.scalars("overview/loss") == [(k + 1, pytest.approx(loss)) for k, loss in enumerate(losses)]
    assert steps(writer, "activation_mean/0") == steps(writer, "activation_mean/2") == [*range(1, 13)]
    assert "nothing_captured" not in {alert.rule for alert in session.alerts}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = net(), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.critic(self.generator(x))


@pytest.mark.parametrize("before_step", [False, True], ids=["while the other is trained", "whenever it is not trained"])
@pytest.mark.parametrize("first", ["generator", "critic"])
def test_nets_that_are_frozen_while_the_other_is_trained_have_a_loss_from_the_first_step_on(first, before_step):
    """As StyleGAN's code freezes them, also before their optimizer steps."""
    model, writer, losses = Pair(), MemoryWriter(), []
    nets = [model.generator, model.critic] if first == "generator" else [model.critic, model.generator]
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05) for one in nets]
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(10):
            nets[k % 2].requires_grad_(True)
            nets[1 - k % 2].requires_grad_(False)
            model.zero_grad()
            parts = [model(batch(10 * part + k)).square().mean() for part in range(2)]
            for part in parts:
                part.backward()
            nets[k % 2].requires_grad_(not before_step)
            optimizers[k % 2].step()
            losses.append(sum(parts).item())
    assert writer.scalars("overview/loss") == [(k + 1, pytest.approx(loss)) for k, loss in enumerate(losses)]
    assert steps(writer, "activation_mean/critic") == [*range(1, 11)]
    assert not session.alerts


def test_nets_of_two_optimizers_that_are_frozen_before_both_step_have_their_loss():
    model, writer, losses = Pair(), MemoryWriter(), []
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05) for one in (model.generator, model.critic)]
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(4):
            model.requires_grad_(True)
            loss = model(batch(k)).square().mean()
            loss.backward()
            model.requires_grad_(False)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert writer.scalars("overview/loss") == [(k + 1, pytest.approx(loss)) for k, loss in enumerate(losses)]


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("every", [None, 1])
def test_passes_of_a_frozen_generator_for_its_critic_are_none_of_its_training(parts, every):
    """As StyleGAN's code freezes it: where the critic is none of the model, nothing else tells."""
    torch.manual_seed(0)
    generator, critic, writer, right = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), net(), MemoryWriter(), {}
    model = nn.ModuleList(generator) if parts else generator
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05) for one in (critic, generator)]
    with torchprobe.instrument(model, writer=writer, every=every):
        for k in range(1, 7):
            for trained, optimizer in enumerate(optimizers):
                generator.requires_grad_(bool(trained))
                critic.requires_grad_(not trained)
                x = 10 ** (1 - trained) * torch.randn(8, 4)
                right[k] = nn.functional.linear(x, generator[0].weight, generator[0].bias).mean().item()
                optimizer.zero_grad()
                critic(generator[1](generator[0](x)) if parts else generator(x)).square().mean().backward()
                optimizer.step()
    found = writer.scalars("activation_mean/0")
    assert found == [(k, pytest.approx(right[k])) for k in ([1, 2, 5] if every is None else [*right])]


def test_a_layer_unfrozen_midway_shows_up():
    model, writer = net(), MemoryWriter()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    totals = []
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(4):
            if k == 2:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.05})
            totals.append(l2(*one_step(model, optimizer, model(batch(k)).square().mean()).values()))
    for tag in ("grad_norm/0.weight", "param_norm/0.weight", "update_ratio/0.weight", "lr/SGD/group_1"):
        assert steps(writer, tag) == [3, 4], tag
    assert [total for _, total in writer.scalars("overview/grad_norm")] == pytest.approx(totals)


def test_a_layer_added_midway_shows_up():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1):
        one_step(model, optimizer, model(batch()).square().mean())
        model.append(nn.Linear(2, 2))
        optimizer.add_param_group({"params": model[3].parameters()})
        one_step(model, optimizer, model(batch()).square().mean())
    for tag in ("grad_norm/3.weight", "activation_mean/3", "param_norm/3.bias"):
        assert steps(writer, tag) == [2], tag


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_a_shared_parameter_has_one_tag_its_first_name():
    model, writer = Tied(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1):
        used = one_step(model, optimizer, model(torch.tensor([1, 1, 3])).square().mean())
    names = {
        tag.split("/", 1)[1] for tag in writer.tags() if tag.startswith(("grad_norm/", "param_norm/", "parameters/"))
    }
    assert names == {"embedding.weight"}
    assert writer.value("grad_norm/embedding.weight") == pytest.approx(l2(used["embedding.weight"]))
    assert writer.value("overview/grad_norm") == pytest.approx(l2(used["embedding.weight"]))


def test_a_shared_module_is_one_entry_with_its_first_name():
    shared = nn.Linear(4, 4)
    model, writer, outputs = nn.Sequential(shared, nn.Tanh(), shared), MemoryWriter(), []
    shared.register_forward_hook(lambda module, args, out: outputs.append(wide(out)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1):
        one_step(model, optimizer, model(batch()).square().mean())
    assert [tag for tag in writer.tags() if tag.startswith("activation_mean/")] == ["activation_mean/0"]
    assert writer.value("activation_mean/0") == pytest.approx(torch.cat(outputs).mean().item())


def test_names_are_those_of_the_model_without_its_wrapper():
    class Wrapper(nn.Module):
        """What a `torch.compile` or checkpoint wrapper does to names."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, x):
            return self._orig_mod(x)

    model, writer = Wrapper(net()), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        one_step(model, optimizer, model(batch()).square().mean())
        assert session.step == 1
    assert writer.scalars("grad_norm/0.weight")
    assert writer.scalars("activation_mean/2")
    assert not [tag for tag in writer.tags() if "_orig_mod" in tag]


def test_exclude_leaves_a_modules_parameters_out_and_include_takes_what_is_inside():
    for options, kept in (({"exclude": "0"}, {"2.weight", "2.bias"}), ({"include": "0"}, {"0.weight", "0.bias"})):
        model, writer = net(), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchprobe.instrument(model, writer=writer, every=1, **options) as session:
            used = one_step(model, optimizer, model(batch()).square().mean())
            assert session.step == 1
        for group in ("grad_norm", "param_norm", "update_ratio", "gradients", "parameters"):
            assert {tag.split("/")[1] for tag in writer.tags() if tag.startswith(f"{group}/")} == kept
        assert writer.value("overview/grad_norm") == pytest.approx(l2(*(used[name] for name in kept)))


def test_an_optimizer_of_excluded_parameters_alone_is_still_the_clock():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1, exclude="0") as session:
        one_step(model, optimizer, model(batch()).square().mean())
        assert session.step == 1
    assert steps(writer, "lr/SGD/group_0") == [1]
    assert "overview/grad_norm" not in writer.tags()


class InBackward(torch.optim.Optimizer):
    """An optimizer for each parameter, which steps in backward; this one stands for all of them and does nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.step_one(torch.optim.SGD([parameter], 0.1)))

    def step_one(self, optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
        def step(_: torch.Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        return step

    def step(self, closure: object = None) -> None:
        """For schedules of the learning rate."""


def test_an_optimizer_that_stands_for_those_that_step_in_backward_hides_none_of_what_they_did():
    torch.manual_seed(0)
    model, writer, losses, ratios = net(), MemoryWriter(), [], []
    optimizer = InBackward(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(8):
            before = model[0].weight.detach().clone()
            loss = model(batch(k)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append((k + 1, pytest.approx(loss.item())))
            ratios.append((k + 1, pytest.approx(l2(model[0].weight - before) / l2(before), rel=1e-4)))
    assert writer.scalars("overview/loss") == losses
    assert writer.scalars("update_ratio/0.weight") == ratios
    assert steps(writer, "grad_norm/0.weight") == [*range(1, 9)]
    assert not session.alerts
