"""The gradient norm before clipping of every kind, however loops are written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import torchprobe
from tests.setups.clipping import FRACTION, UNCLIPPED, each, run, total
from tests.setups.loops import TOTAL, batch, loss_of, net, sgd, steps, values
from tests.setups.reference import gradients, l2
from torchprobe.testing import MemoryWriter


def by_hand(parameters: list[nn.Parameter]) -> None:
    norm = torch.stack([g.norm() for g in each(parameters)]).norm()
    if norm > 0.5:
        for g in each(parameters):
            g.data.mul_(0.5 / norm)


def replaced(parameters: list[nn.Parameter]) -> None:
    norm = torch.stack([g.norm() for g in each(parameters)]).norm()
    for p in parameters:
        p.grad = p.grad * (0.25 / norm).clamp(max=1.0)


def by_parts(parameters: list[nn.Parameter]) -> None:
    clip_grad_norm_(parameters[:2], 0.1)
    clip_grad_norm_(parameters[2:], 0.3)


def one_by_one(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        clip_grad_norm_([p], 0.123)  # of three digits, which the parameters have in common


CLIPPED = {
    "norm": lambda ps: clip_grad_norm_(ps, 1.0),
    "norm, one by one": lambda ps: clip_grad_norm_(ps, 0.1, foreach=False),
    "largest": lambda ps: clip_grad_norm_(ps, 0.2, norm_type=math.inf),
    "value": lambda ps: clip_grad_value_(ps, 0.05),
    "small value": lambda ps: clip_grad_value_(ps, 0.00123),
    "clamp": lambda ps: [g.clamp_(-0.1, 0.1) for g in each(ps)],
    "by hand": by_hand,
    "replaced": replaced,
    "parts of the model": by_parts,
    "each parameter": one_by_one,
    "only the first layer": lambda ps: clip_grad_norm_(ps[:2], 0.01),
}


@pytest.mark.parametrize("change", CLIPPED.values(), ids=CLIPPED)
def test_the_norm_before_clipping_is_recorded_and_how_often_it_was_clipped(change):
    writer, before = run(change)
    assert values(writer, UNCLIPPED) == pytest.approx(before, rel=1e-5)
    assert values(writer, FRACTION) == pytest.approx([1, 1, 2 / 3, 3 / 4])
    assert all(used < norm for used, norm in zip(values(writer, TOTAL)[:2], before[:2], strict=True))


def test_without_clipping_both_norms_are_the_same():
    writer, before = run(None)
    assert values(writer, UNCLIPPED) == values(writer, TOTAL) == pytest.approx(before)
    assert values(writer, FRACTION) == [0.0] * 4


def test_nothing_is_read_at_other_steps():
    writer, _ = run(lambda ps: clip_grad_norm_(ps, 1.0), probes=[torchprobe.Gradients(every=3)])
    assert steps(writer, UNCLIPPED) == steps(writer, FRACTION) == steps(writer, TOTAL) == [1, 3]


def test_an_odd_limit_counts_once_a_second_step_ends_at_it(caplog):
    with caplog.at_level("INFO", "torchprobe"):
        writer, before = run(lambda ps: clip_grad_norm_(ps, 1.3371))
    assert steps(writer, UNCLIPPED) == [2, 3, 4]
    assert values(writer, UNCLIPPED) == pytest.approx(before[1:], rel=1e-5)
    said = [record.levelname for record in caplog.records if "grad_norm_unclipped is left out" in record.message]
    assert said == ["INFO"]  # of the first step, which may be all there is


def test_a_limit_that_moves_counts_once_a_step_was_not_clipped():
    norms: list[float] = []

    def adaptive(parameters: list[nn.Parameter]) -> None:
        norms.append(float(clip_grad_norm_(parameters, 1.5 * min(norms, default=1e9))))

    writer, before = run(adaptive)
    assert values(writer, UNCLIPPED) == pytest.approx(before, rel=1e-5)
    assert values(writer, FRACTION) == [0.0, 0.5, 1 / 3, 0.5]


def test_gradients_that_are_not_finite_have_the_norm_of_what_is():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        loss_of(model).backward()
        model[2].weight.grad[0, 0] = math.nan  # by a hook of the model's own, as it were
        left = [g[g.isfinite()] for g in gradients(model).values()]
        optimizer.step()
    assert values(writer, TOTAL) == pytest.approx([l2(*left)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    torch.manual_seed(1)
    model, writer = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype), MemoryWriter()
    optimizer, before = sgd(model, lr=1e-4), []
    with torchprobe.instrument(model, writer=writer, every=1):
        for k, size in enumerate((30, 80, 1e-3)):
            optimizer.zero_grad()
            (size * model(batch(k, 6, 64).to(dtype)).square().mean()).backward()
            before.append(total(model))
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert values(writer, UNCLIPPED) == pytest.approx(before, rel=1e-5)
    assert values(writer, FRACTION) == pytest.approx([1, 1, 2 / 3])


def test_accumulated_gradients_are_those_of_the_last_backward_pass():
    model, writer, before = net(), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            optimizer.zero_grad(set_to_none=k % 2 == 0)
            for micro in range(3):
                (10 * loss_of(model, 3 * k + micro)).backward()
            before.append(total(model))
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    assert values(writer, UNCLIPPED) == pytest.approx(before, rel=1e-5)
    assert values(writer, FRACTION) == [1.0] * 3


def test_several_optimizers_share_one_total():
    model, writer, before = net(), MemoryWriter(), []
    optimizers = [sgd(model[0]), torch.optim.AdamW(model[2].parameters(), lr=1e-3)]
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            model.zero_grad()
            (50 * loss_of(model, k)).backward()
            before.append(total(model))
            clip_grad_norm_(model.parameters(), 0.5)
            for optimizer in optimizers:
                optimizer.step()
    assert values(writer, UNCLIPPED) == pytest.approx(before, rel=1e-5)


def test_clipping_inside_a_closure_and_in_a_hook_of_the_optimizer():
    model, writer, before = net(), MemoryWriter(), []
    optimizer = sgd(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 50 * loss_of(model, len(before))
        loss.backward()
        before.append(total(model))
        if len(before) < 3:
            clip_grad_norm_(model.parameters(), 0.5)
        return loss

    with torchprobe.instrument(model, writer=writer, every=1):
        optimizer.step(closure)
        optimizer.step(closure)
        optimizer.register_step_pre_hook(lambda *_: clip_grad_norm_(model.parameters(), 0.5) and None)
        closure()
        optimizer.step()
    assert values(writer, UNCLIPPED) == pytest.approx(before, rel=1e-5)
    assert values(writer, FRACTION) == [1.0] * 3
    assert values(writer, TOTAL) == pytest.approx([0.5] * 3, rel=1e-4)


@pytest.mark.parametrize("scale", [2.0**12, 1000.0])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["plain", "fused"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_loss_scale_is_taken_out(scale, kind, limit):
    model, writer, before = net(), MemoryWriter(), []
    optimizer = kind(model.parameters(), lr=1e-4, fused=kind is torch.optim.AdamW)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            optimizer.zero_grad()
            scaler.scale(20 * loss_of(model, k)).backward()
            before.append(total(model) / scale)
            if limit:
                scaler.unscale_(optimizer)
                clip_grad_norm_(model.parameters(), limit)
            scaler.step(optimizer)
            scaler.update()
    assert values(writer, UNCLIPPED) == pytest.approx(before, rel=1e-5)
    assert values(writer, FRACTION) == [float(limit is not None)] * 3


def test_a_gradient_penalty_before_the_backward_pass_changes_nothing():
    model, writer, before = net(), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            x = batch(k).requires_grad_()
            loss = model(x).square().mean()
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + slope.square().sum()).backward()
            before.append(total(model))
            clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    assert values(writer, UNCLIPPED) == pytest.approx(before, rel=1e-5)


def test_a_skipped_sample_leaves_nothing_for_the_next_step():
    """What one step left is not compared with what another one used."""
    model, writer, before = net(), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Gradients(every=2)]):
        for k in range(4):
            optimizer.zero_grad()
            (20 * loss_of(model, k)).backward()
            before.append(total(model))
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    assert writer.scalars(UNCLIPPED) == [(k, pytest.approx(before[k - 1])) for k in (1, 2, 4)]


def test_training_is_bitwise_the_same():
    def train(watched: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = net()
        optimizer = sgd(model)
        session = torchprobe.instrument(model, writer=MemoryWriter(), every=1) if watched else None
        for k in range(3):
            optimizer.zero_grad()
            for micro in range(2):
                (20 * loss_of(model, 2 * k + micro)).backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        if session is not None:
            session.detach()
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(*pair) for pair in zip(train(True), train(False), strict=True))
