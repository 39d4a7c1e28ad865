"""Steps that the user counts, and passes that count as steps for want of an optimizer."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import torchprobe
from tests.setups.loops import TOTAL, batch, net, sgd, steps, train_step, values
from torchprobe.testing import MemoryWriter

# ---- the user's clock


def test_steps_by_hand_from_the_first_one():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        expected = []
        for k in range(3):
            expected.append(train_step(model, optimizer, k))
            session.log_metrics({"k": k + 1})
            session.next_step()
            assert session.step == k + 1
    assert writer.scalars("k") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert values(writer, TOTAL) == pytest.approx(expected)


def test_of_several_optimizer_steps_in_a_step_by_hand_the_last_counts():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        session.next_step()  # step 1 is empty
        last = []
        for k in range(2):
            totals = [train_step(model, optimizer, 3 * k + i) for i in range(3)]
            last.append(totals[-1])
            session.next_step()
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(2, pytest.approx(last[0])), (3, pytest.approx(last[1]))]


def test_steps_by_hand_without_an_optimizer():
    model, writer = net().eval(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1) as session, torch.no_grad():
        model(batch())
        session.next_step()  # that pass was step 1 already; from now on, a pass is none
        for k in range(2):
            for i in range(2):
                model(batch(2 * k + i))
            session.log_metrics({"k": k + 2})
            session.next_step()
        assert session.step == 3
    assert writer.scalars("k") == [(2, 2.0), (3, 3.0)]
    assert steps(writer, "val/activation_mean/0") == [1, 2, 3]


# ---- no optimizer in sight


@pytest.mark.parametrize(
    ("training", "grad", "prefix"),
    [(False, False, "val/"), (True, False, ""), (True, True, ""), (False, True, "val/")],
    ids=["eval, no_grad", "train, no_grad", "train, with gradients", "eval, with gradients"],
)
def test_in_pure_inference_forward_passes_are_the_clock(training, grad, prefix):
    model, writer = net().train(training), MemoryWriter()
    means = []
    with torchprobe.instrument(model, writer=writer, every=1) as session, torch.set_grad_enabled(grad):
        for k in range(4):
            means.append(model(batch(k)).double().mean().item())
            session.log_metrics({"k": k + 1})
        session.flush()
        assert session.step == 4
    assert writer.scalars(f"{prefix}activation_mean/2") == [(k + 1, pytest.approx(m)) for k, m in enumerate(means)]
    assert writer.scalars("k") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert not [tag for tag in writer.tags() if tag.startswith("activation" if prefix else "val/")]


def test_inference_is_sampled_at_the_cadence():
    model, writer = net().eval(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=3), torch.no_grad():
        for k in range(7):
            model(batch(k))
    assert steps(writer, "val/activation_mean/0") == [1, 3, 6]


def test_passes_with_other_weights_do_not_hide_the_optimizer():
    """MAML: the weights of an inner loop are no optimizer's, and each of its passes was taken for a step."""
    model, writer, losses = net(), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            fast, optimizer_losses = dict(model.named_parameters()), []
            for task in range(2):
                inner = functional_call(model, fast, (batch(k),)).square().mean()
                gradients = torch.autograd.grad(inner, [*fast.values()], create_graph=True)
                fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
                outer = functional_call(model, fast, (batch(10 + task),)).square().mean()
                outer.backward(retain_graph=True)
                optimizer_losses.append(outer.item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum(optimizer_losses))
    assert writer.scalars("overview/loss") == [(k, pytest.approx(loss)) for k, loss in enumerate(losses, 1)]
    assert steps(writer, TOTAL) == [1, 2, 3]
