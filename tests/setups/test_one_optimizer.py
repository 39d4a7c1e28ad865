"""Steps of one optimizer: when it steps, which gradients and which learning rates it used."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import torchprobe
from tests.setups.loops import TOTAL, loss_of, net, sgd, steps, train_step, values
from tests.setups.reference import gradients, l2
from torchprobe.testing import MemoryWriter

# ---- one optimizer


def test_a_plain_loop_counts_optimizer_steps_from_one():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(4):
            expected.append((k + 1, train_step(model, optimizer, k)))
            assert session.step == k + 1
    assert writer.scalars(TOTAL) == [(k, pytest.approx(norm)) for k, norm in expected]
    assert steps(writer, "activation_mean/2") == [1, 2, 3, 4]
    assert steps(writer, "lr/SGD/group_0") == [1, 2, 3, 4]


def test_a_cadence_samples_step_one_and_then_every_nth():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=3):
        for k in range(7):
            train_step(model, optimizer, k)
    for tag in (TOTAL, "activation_mean/0", "param_norm/0.weight", "update_ratio/0.weight"):
        assert steps(writer, tag) == [1, 3, 6], tag
    for tag in ("lr/SGD/group_0", "overview/loss"):  # which cost nothing
        assert steps(writer, tag) == [1, 2, 3, 4, 5, 6, 7]


def test_uneven_gradient_accumulation_is_one_step_with_the_accumulated_gradient():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for micro_batches in (3, 1, 2):
            optimizer.zero_grad()
            for i in range(micro_batches):
                (loss_of(model, seed=i, size=2 + 3 * i) / micro_batches).backward()
            expected.append(gradients(model))
            optimizer.step()
        assert session.step == 3
    assert values(writer, "grad_norm/0.weight") == pytest.approx([l2(g["0.weight"]) for g in expected])
    assert values(writer, "grad_norm_layer/0") == pytest.approx([l2(g["0.weight"], g["0.bias"]) for g in expected])
    assert values(writer, "grad_mean_abs/2") == pytest.approx(
        [torch.cat([g["2.weight"].flatten(), g["2.bias"]]).abs().mean().item() for g in expected]
    )


def test_the_gradient_norm_is_the_one_after_clipping():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            (100 * loss_of(model, k)).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25) > 0.25
            optimizer.step()
    assert values(writer, TOTAL) == pytest.approx([0.25, 0.25], rel=1e-4)


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_optimizer_made_before_or_after_instrument_is_found(made):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model) if made == "before" else None
    with torchprobe.instrument(model, writer=writer, every=1):
        optimizer = optimizer or sgd(model)
        for k in range(2):
            train_step(model, optimizer, k)
    assert steps(writer, TOTAL) == [1, 2]


def test_an_optimizer_of_another_model_is_not_the_clock():
    model, other = net(), net()
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
        train_step(other, sgd(other))
        assert session.step == 0


def test_two_models_in_one_process_have_a_clock_and_values_of_their_own():
    models, writers = [net(), net()], [MemoryWriter(), MemoryWriter()]
    optimizers = [sgd(model) for model in models]
    expected: list[list[float]] = [[], []]
    sessions = [torchprobe.instrument(m, writer=w, every=1) for m, w in zip(models, writers, strict=True)]
    for which in (0, 1, 0, 0, 1):
        expected[which].append(train_step(models[which], optimizers[which], seed=len(expected[which])))
    assert [session.step for session in sessions] == [3, 2]
    for session in sessions:
        session.detach()
    assert [values(writer, TOTAL) for writer in writers] == [pytest.approx(e) for e in expected]
    assert [steps(writer, "lr/SGD/group_0") for writer in writers] == [[1, 2, 3], [1, 2]]


def test_one_optimizer_over_two_models_is_the_clock_of_both():
    first, second, writers = net(), net(), [MemoryWriter(), MemoryWriter()]
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    with (
        torchprobe.instrument(first, writer=writers[0], every=1) as one,
        torchprobe.instrument(second, writer=writers[1], every=1) as two,
    ):
        for _ in range(2):
            optimizer.zero_grad()
            (loss_of(first) + loss_of(second)).backward()
            expected = [l2(*gradients(model).values()) for model in (first, second)]
            optimizer.step()
        assert (one.step, two.step) == (2, 2)
    assert [writer.value(TOTAL, 2) for writer in writers] == pytest.approx(expected)


# ---- learning rates


def test_the_learning_rate_is_the_one_that_the_step_used():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            train_step(model, optimizer, k)
            scheduler.step()
    assert writer.scalars("lr/SGD/group_0") == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_a_learning_rate_that_is_a_tensor_changed_in_place():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            train_step(model, optimizer, k)
            scheduler.step()
    assert writer.scalars("lr/AdamW/group_0") == [(1, 0.5), (2, 0.25), (3, 0.125)]


def test_parameter_groups_and_a_second_optimizer_of_the_same_class_have_tags_of_their_own():
    model, writer = net(), MemoryWriter()
    first = torch.optim.AdamW(
        [{"params": model[0].weight}, {"params": model[0].bias, "lr": 0.25, "weight_decay": 0.0}], lr=0.5
    )
    second = torch.optim.AdamW(model[2].parameters(), lr=0.125)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            loss_of(model, k).backward()
            first.step()
            second.step()
            first.param_groups[0]["weight_decay"] = 0.5 * (k + 1)
    assert writer.scalars("lr/AdamW/group_0") == [(1, 0.5), (2, 0.5)]
    assert writer.scalars("lr/AdamW/group_1") == [(1, 0.25), (2, 0.25)]
    assert writer.scalars("lr/AdamW_1/group_0") == [(1, 0.125), (2, 0.125)]
    assert writer.scalars("weight_decay/AdamW/group_0") == [(1, 0.01), (2, 0.5)]
    assert writer.scalars("weight_decay/AdamW/group_1") == [(1, 0.0)]
    assert writer.scalars("momentum/AdamW/group_0") == [(1, 0.9)]


def test_the_label_of_a_living_optimizer_is_never_given_twice():
    model, writer = net(), MemoryWriter()
    weights, biases = ([p for p in model.parameters() if (p.dim() == 2) is matrix] for matrix in (True, False))
    first, second = torch.optim.AdamW(weights, lr=0.5), torch.optim.AdamW(biases, lr=0.25)
    with torchprobe.instrument(model, writer=writer, every=1):
        loss_of(model).backward()
        first.step()
        second.step()
        del first
        gc.collect()
        first = torch.optim.AdamW(weights, lr=0.125)
        loss_of(model).backward()
        second.step()
        first.step()
    assert writer.value("lr/AdamW/group_0") == 0.125
    assert values(writer, "lr/AdamW_1/group_0") == [0.25, 0.25]


class ByHand(torch.optim.Optimizer):
    """Takes a learning rate of any kind."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= float(group["lr"]) * p.grad


def test_a_learning_rate_that_is_an_array_is_read_at_each_step_also_when_it_changes_in_place():
    model, writer, rate = net(), MemoryWriter(), np.array(0.5)
    optimizer = ByHand(model.parameters(), {"lr": rate})
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            train_step(model, optimizer, k)
            rate *= 0.5
    assert writer.scalars("lr/ByHand/group_0") == [(1, 0.5), (2, 0.25), (3, 0.125)]


@pytest.mark.parametrize("hook", ["before", "after"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_hook_of_the_optimizers_that_runs_the_model_with_gradients_takes_nothing_from_the_step(hook, kept):
    model, writer, outputs = net(), MemoryWriter(), []
    optimizer, losses, norms = sgd(model), [], []

    def look(*arguments):
        outputs[:] = [model(torch.randn(2, 4))] if kept else [model(torch.randn(2, 4)).sum().item()]

    (optimizer.register_step_pre_hook if hook == "before" else optimizer.register_step_post_hook)(look)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(4):
            optimizer.zero_grad()
            loss = loss_of(model, seed=k)
            loss.backward()
            losses.append(loss.item())
            norms.append(l2(*gradients(model).values()))
            optimizer.step()
        assert session.step == 4
    assert writer.scalars("overview/loss") == [(k, pytest.approx(loss)) for k, loss in enumerate(losses, 1)]
    assert writer.scalars(TOTAL) == [(k, pytest.approx(norm)) for k, norm in enumerate(norms, 1)]
    assert steps(writer, "activation_mean/0") == [1, 2, 3, 4]
