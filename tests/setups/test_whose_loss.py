"""Which loss is the training loss of a model, among others that are computed or of other models."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import torchprobe
from tests.setups import losses as shared  # noqa: F401 - whose loss modules are made anew
from tests.setups.losses import CRITERION, TAG, WAYS, F, batch, losses, net, sgd
from torchprobe.capture.backward import roots
from torchprobe.testing import MemoryWriter


@pytest.mark.parametrize("way", ["loss module", "functional"])
def test_two_models_in_one_process_have_a_loss_each(way):
    models, writers = [net(), net()], [MemoryWriter(), MemoryWriter()]
    expected: list[list[float]] = [[], []]
    with (
        torchprobe.instrument(models[0], writer=writers[0], every=1),
        torchprobe.instrument(models[1], writer=writers[1], every=1),
    ):
        optimizers = [sgd(model) for model in models]
        for k in range(2):
            outputs = [model(batch(k + i)[0]) for i, model in enumerate(models)]
            found = [WAYS[way](out, batch(k + i)[1]) for i, out in enumerate(outputs)]
            for i in (0, 1):
                expected[i].append(found[i].item())
                optimizers[i].zero_grad()
                found[i].backward()
            for optimizer in optimizers:
                optimizer.step()
    assert [losses(writer) for writer in writers] == [pytest.approx(e) for e in expected]


def test_the_loss_of_another_model_that_is_not_watched_is_not_taken():
    model, teacher, writer = net(), net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        x, y = batch()
        out = model(x)
        CRITERION(teacher(x), y)
        loss = CRITERION(out, y)
        loss.backward()
        optimizer.step()
    assert losses(writer) == pytest.approx([loss.item()])


def test_a_head_of_the_same_optimizer_that_is_not_watched_and_trained_further_by_itself_hides_no_loss():
    model, head, writer, expected = net(), torch.nn.Linear(3, 2), MemoryWriter(), []
    both, alone = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1), sgd(head)
    with torchprobe.instrument(model, writer=writer):
        for k in range(5):
            both.zero_grad()
            loss = head(model(batch(k)[0])).square().mean()
            loss.backward()
            both.step()
            expected.append(loss.item())
            for _ in range(2):
                alone.zero_grad()
                head(model(batch(k)[0]).detach()).square().mean().backward()
                alone.step()
    assert losses(writer) == pytest.approx(expected)


def test_a_backward_pass_of_another_model_between_hides_no_loss_of_a_part_without_gradients():
    """Soft actor-critic: a temperature is trained in between, and the critic keeps gradients of the actor's loss."""
    nets, writer, expected = torch.nn.ModuleList([net(), torch.nn.LazyLinear(1)]), MemoryWriter(), []
    (actor, critic), temperature = nets, torch.zeros(1, requires_grad=True)
    critic(actor(batch()[0]))
    of_critic, of_actor = sgd(critic), sgd(actor)
    with torchprobe.instrument(nets, writer=writer, every=1):
        for k in range(4):
            x = batch(k)[0]
            for optimizer, policy in ((of_critic, False), (of_actor, True), (of_actor, True)):
                loss = critic(actor(x)).mean() if policy else critic(actor(x).detach()).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                expected.append(loss.item())
                if policy:
                    temperature.exp().sum().backward()
    assert losses(writer) == pytest.approx(expected)


def test_a_term_that_nobody_heard_is_in_the_gradients_of_one_of_two_optimizers_and_no_loss_is_written():
    nets, writer = torch.nn.ModuleList([net(), torch.nn.LazyLinear(1)]), MemoryWriter()
    nets[1](nets[0](batch()[0]))
    optimizers, expected = [sgd(nets[0]), sgd(nets[1])], {}
    with torchprobe.instrument(nets, writer=writer, every=1):
        for k in range(1, 11):
            loss = nets[1](nets[0](batch(k)[0])).square().mean()
            if k == 8:
                nets[1].weight.square().sum().backward()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step(), optimizer.zero_grad()
            expected[k] = loss.item()
    del expected[8]
    assert dict(writer.scalars(TAG)) == pytest.approx(expected)


def test_the_loss_of_a_validation_pass_is_not_the_training_loss():
    model, writer, expected = net(), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            x, y = batch(k)
            optimizer.zero_grad()
            loss = CRITERION(model(x), y)
            expected.append(loss.item())
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                CRITERION(model(x), y)
            model.train()
    assert losses(writer) == pytest.approx(expected)


def test_a_metric_computed_with_a_loss_module_between_backward_and_step_does_not_count():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        x, y = batch()
        out = model(x)
        loss = F.cross_entropy(out, y)
        loss.backward()
        CRITERION(out * 3, y)
        optimizer.step()
    assert losses(writer) == pytest.approx([loss.item()])


def test_no_loss_where_there_is_none_to_be_seen():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for p in model.parameters():
            p.grad = torch.ones_like(p)  # gradients from elsewhere
        optimizer.step()
        assert session.step == 1
    assert TAG not in writer.tags()


@pytest.mark.parametrize("every", [1, None])
def test_steps_by_autograd_grad_among_others_are_no_reason_to_say_that_no_loss_was_seen(every):
    """As the first-order search of architectures does in turn with its weights' steps."""
    model, writer, expected = net(), MemoryWriter(), []
    optimizers = [sgd(model[0]), sgd(model[2])]
    with torchprobe.instrument(model, writer=writer, every=every) as session:
        for k in range(12):
            part = model[k % 2 * 2]
            optimizers[k % 2].zero_grad()
            loss = CRITERION(model(batch(k)[0]), batch(k)[1])
            if k % 2:
                loss.backward()
                expected.append((k + 1, pytest.approx(loss.item())))
            else:
                part.weight.grad, part.bias.grad = torch.autograd.grad(loss, [part.weight, part.bias])
            optimizers[k % 2].step()
    assert writer.scalars(TAG) == expected
    assert not [alert for alert in session.alerts if alert.rule == "nothing_captured"]


def test_what_backward_was_called_on_is_found_from_the_engines_own_thread():
    """As on CUDA, where hooks run in a thread of the autograd engine."""
    x, found = torch.ones(3, requires_grad=True), []

    def hook(gradient: Tensor) -> None:
        thread = threading.Thread(target=lambda: found.append(roots(0)))
        thread.start()
        thread.join()

    y = x * 2
    y.register_hook(hook)
    loss = y.sum()
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, x)
    assert found[0].tensors == (loss,)
    assert found[0].value == 6.0
    assert (found[1].call, found[1].value) == ("grad", None)
