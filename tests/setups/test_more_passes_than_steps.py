"""More forward and backward passes than optimizer steps."""

from __future__ import annotations

import pytest
import torch

import torchprobe
from tests.setups.loops import TOTAL, batch, loss_of, net, sgd, steps, values
from tests.setups.reference import gradients, l2
from torchprobe.testing import MemoryWriter


def test_several_forward_passes_before_one_backward_are_one_step_from_the_first_on():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            optimizer.zero_grad()
            pair = [model(batch(10 * k + i, size=2 + i)) for i in range(3)]
            expected.append(torch.cat(pair).double().mean().item())
            sum(out.square().mean() for out in pair).backward()
            optimizer.step()
            assert session.step == k + 1
    assert writer.scalars("activation_mean/2") == [(k + 1, pytest.approx(mean)) for k, mean in enumerate(expected)]
    assert len(writer.records) == 3


def test_of_two_passes_as_in_sharpness_aware_minimisation_the_one_counts_whose_gradients_are_used():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    means, norms = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            outputs = [model(batch(k))]
            outputs[0].square().mean().backward()
            slopes = [p.grad.clone() for p in model.parameters()]
            with torch.no_grad():
                torch._foreach_add_(list(model.parameters()), slopes, alpha=0.05)
            optimizer.zero_grad()
            outputs.append(model(batch(k)))
            outputs[1].square().mean().backward()
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), slopes, alpha=0.05)
            norms.append(l2(*gradients(model).values()))
            means.append(outputs[1].double().mean().item())
            optimizer.step()
            optimizer.zero_grad()
        assert session.step == 3
    assert values(writer, TOTAL) == pytest.approx(norms)
    assert values(writer, "activation_mean/2") == pytest.approx(means)
    assert values(writer, "overview/skipped_steps") == [0]


def test_a_model_that_is_trained_in_eval_mode():
    model, writer = net().eval(), MemoryWriter()
    optimizer = sgd(model)
    expected, losses = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, k)
            loss.backward()
            session.log_metrics({"before": k + 1})
            expected.append(l2(*gradients(model).values()))
            losses.append(loss.item())
            optimizer.step()
            session.log_metrics({"after": k + 1})
            assert session.step == k + 1
    assert values(writer, TOTAL) == pytest.approx(expected)
    assert writer.scalars("before") == writer.scalars("after") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert values(writer, "overview/loss") == pytest.approx(losses)


def test_weights_updated_by_hand_without_an_optimizer():
    model, writer = net(), MemoryWriter()
    losses = []
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=1) as session:
        for k in range(3):
            loss = loss_of(model, k)
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        session.flush()
        assert session.step == 3
    assert writer.scalars("overview/loss") == [(k + 1, pytest.approx(loss)) for k, loss in enumerate(losses)]
    assert steps(writer, "activation_mean/0") == [1, 2, 3]
    assert values(writer, "overview/skipped_steps")[-1] == 0


@pytest.mark.parametrize("zero_grad", ["first", "before backward"])
def test_a_gradient_penalty_is_no_skipped_step(zero_grad):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=1) as session:
        for k in range(3):
            if zero_grad == "first":
                optimizer.zero_grad()
            loss = loss_of(model, k)
            x = batch(k + 10).requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            if zero_grad == "before backward":
                optimizer.zero_grad()
            (loss + slope.square().mean()).backward()
            expected.append(l2(*gradients(model).values()))
            optimizer.step()
        assert session.step == 3
    assert values(writer, TOTAL) == pytest.approx(expected)
    assert values(writer, "overview/skipped_steps")[-1] == 0
    assert steps(writer, "activation_mean/0") == steps(writer, "activation_grad_norm/0") == [1, 2, 3]
    assert steps(writer, "overview/loss") == [1, 2, 3]


@pytest.mark.parametrize("zero_grad", ["first", "before backward"])
def test_an_adversarial_input_search_is_no_skipped_step(zero_grad):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=1) as session:
        for k in range(3):
            if zero_grad == "first":
                optimizer.zero_grad()
            x = batch(k).requires_grad_()
            for _ in range(2):
                (slope,) = torch.autograd.grad(model(x).square().mean(), x)
                x = (x + 0.1 * slope.sign()).detach().requires_grad_()
            loss = model(x).square().mean()
            if zero_grad == "before backward":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert session.step == k + 1
    assert steps(writer, TOTAL) == steps(writer, "activation_mean/0") == [1, 2, 3]
    assert values(writer, "overview/skipped_steps")[-1] == 0
