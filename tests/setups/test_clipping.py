"""The gradient norm before clipping of every kind, and that it is absent where something else changed gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import torchprobe
from tests.setups.loops import TOTAL, batch, loss_of, net, sgd, steps, values
from tests.setups.reference import gradients, l2
from torchprobe.testing import MemoryWriter

UNCLIPPED, FRACTION = "overview/grad_norm_unclipped", "overview/clipped_fraction"

Change = Callable[[list[nn.Parameter]], object]


def total(model: nn.Module) -> float:
    return l2(*gradients(model).values())


def run(change: Change | None, sizes=(30.0, 80.0, 1e-3, 50.0), **options) -> tuple[MemoryWriter, list[float]]:
    """A loop whose losses have these factors, with `change` between backward pass and step; norms before it."""
    torch.manual_seed(0)
    model, writer = net(), MemoryWriter()
    optimizer, before = sgd(model, lr=1e-4), []
    with torchprobe.instrument(model, writer=writer, every=1, **options):
        for k, size in enumerate(sizes):
            optimizer.zero_grad()
            (size * loss_of(model, k)).backward()
            before.append(total(model))
            if change is not None:
                change(list(model.parameters()))
            optimizer.step()
    return writer, before


def each(parameters: list[nn.Parameter]) -> Iterator[torch.Tensor]:
    return (p.grad for p in parameters)


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
    writer, before = run(lambda ps: clip_grad_norm_(ps, 1.3371))
    assert steps(writer, UNCLIPPED) == [2, 3, 4]
    assert values(writer, UNCLIPPED) == pytest.approx(before[1:], rel=1e-5)
    assert "left out" not in caplog.text


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


# ---- how loops are written


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


# ---- what is no clipping


def noise(parameters: list[nn.Parameter]) -> None:
    for g in each(parameters):
        g += 1e-2 * g.std(unbiased=False) * torch.randn_like(g)


def centralise(parameters: list[nn.Parameter]) -> None:
    for g in each(parameters):
        g -= g.mean(dim=-1, keepdim=True) if g.dim() > 1 else 0.0


def freeze_rows(parameters: list[nn.Parameter]) -> None:
    parameters[0].grad[:2] = 0.0


def drop_largest(parameters: list[nn.Parameter]) -> None:
    flat = parameters[0].grad.view(-1)
    flat[flat.abs().argmax()] = 0.0


def take_away(parameters: list[nn.Parameter]) -> None:
    parameters[3].grad = None


def scale_by_hand(parameters: list[nn.Parameter]) -> None:
    for g in each(parameters):
        g /= 7


def scale_and_clip(parameters: list[nn.Parameter]) -> None:
    scale_by_hand(parameters)
    clip_grad_norm_(parameters, 0.01)


def scale_layers(parameters: list[nn.Parameter]) -> None:
    for i, g in enumerate(each(parameters)):
        g *= 0.9**i


def normalise(parameters: list[nn.Parameter]) -> None:
    norm = torch.stack([g.norm() for g in each(parameters)]).norm()
    for g in each(parameters):
        g *= 1e3 / norm


def clip_and_zero(parameters: list[nn.Parameter]) -> None:
    clip_grad_norm_(parameters, 0.5)
    parameters[1].grad.zero_()


def one_sided(parameters: list[nn.Parameter]) -> None:
    for g in each(parameters):
        g.clamp_(min=-1e-5)


OTHERWISE = {
    "noise": noise,
    "centralised": centralise,
    "frozen rows": freeze_rows,
    "the largest element dropped": drop_largest,
    "taken away": take_away,
    "divided by a constant": scale_by_hand,
    "divided, then clipped": scale_and_clip,
    "scaled by layer": scale_layers,
    "normalised upwards": normalise,
    "clipped, then zeroed": clip_and_zero,
    "clipped at one side": one_sided,
}


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_it_is_absent_and_said_once_where_something_else_changed_gradients(change, caplog):
    with caplog.at_level(logging.WARNING, "torchprobe"):
        writer, _ = run(change, sizes=(3.0, 8.0, 30.0, 5.0))
    assert UNCLIPPED not in writer.tags()
    assert FRACTION not in writer.tags()
    assert caplog.text.count("grad_norm_unclipped is left out") == 1
    assert steps(writer, TOTAL) == [1, 2, 3, 4]


def test_a_common_factor_that_varies_is_no_clipping():
    factors = iter((3.1, 5.7, 4.3, 9.9, 2.6, 7.7))

    def by_tokens(parameters: list[nn.Parameter]) -> None:
        factor = next(factors)
        for g in each(parameters):
            g /= factor

    writer, _ = run(by_tokens, sizes=(3.0, 8.0, 30.0, 5.0, 7.0, 6.0))
    assert UNCLIPPED not in writer.tags()


def test_the_summary_says_why():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(2):
            optimizer.zero_grad()
            loss_of(model, k).backward()
            noise(list(model.parameters()))
            optimizer.step()
        session.flush()
        assert "overview/grad_norm_unclipped is left out where gradients were changed by" in session.summary()


@pytest.mark.parametrize("kind", ["second backward pass", "each micro-batch"])
def test_a_backward_pass_after_clipping_leaves_no_norm_before_it(kind, caplog):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            for micro in range(2):
                (20 * loss_of(model, 2 * k + micro)).backward()
                if micro == 0 or kind == "each micro-batch":
                    clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    assert UNCLIPPED not in writer.tags()
    assert caplog.text.count("changed between two backward passes") == 1


def test_gradients_of_autograd_grad_have_no_norm_before(caplog):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            found = torch.autograd.grad(loss_of(model, k), list(model.parameters()))
            for p, g in zip(model.parameters(), found, strict=True):
                p.grad = g
            optimizer.step()
    assert steps(writer, TOTAL) == [1, 2]
    assert UNCLIPPED not in writer.tags()
    assert caplog.text.count("no backward pass was seen to end") == 1


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
