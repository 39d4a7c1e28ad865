"""The gradient norm before clipping is absent, and it is said why, where something else changed gradients."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import torchprobe
from tests.setups.clipping import FRACTION, UNCLIPPED, each, run
from tests.setups.loops import TOTAL, loss_of, net, sgd, steps
from torchprobe.testing import MemoryWriter


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


def test_a_penalty_with_a_backward_pass_of_its_own_changes_nothing(caplog):
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1), caplog.at_level(logging.WARNING, "torchprobe"):
        for k in range(2):
            optimizer.zero_grad()
            loss_of(model, k).backward()
            sum(p.square().sum() for p in model.parameters()).backward()
            optimizer.step()
    assert steps(writer, UNCLIPPED) == [1, 2]
    assert writer.value(UNCLIPPED) == pytest.approx(writer.value(TOTAL))
    assert "overview/loss" not in caplog.text
