"""Mixture layers of anybody's: recorded where the weights recompute, and said where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter

EXPERTS, WIDTH = 4, 6


class Router(nn.Module):
    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.weight, self.wrong = nn.Parameter(torch.randn(EXPERTS, WIDTH)), wrong

    def forward(self, x):
        logits = nn.functional.linear(x, self.weight)
        weights, chosen = logits.softmax(-1).topk(2)
        return logits, (weights.flip(-1) if self.wrong else weights), chosen


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, x, chosen, weights):
        return torch.einsum("tkij,tj,tk->ti", self.weight[chosen], x, weights)


class Mixture(nn.Module):
    """change: what is done to the choices before the experts see them."""

    def __init__(self, wrong: bool = False, change=lambda chosen: chosen) -> None:
        super().__init__()
        self.gate, self.experts, self.change = Router(wrong), Experts(), change

    def forward(self, x):
        _, weights, chosen = self.gate(x)
        return self.experts(x, self.change(chosen), weights)


class Written(nn.Module):
    """Experts in a list, chosen within the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        return sum(p[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class Sampler(nn.Module):
    """The same output as a router's, with which nothing is routed."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.after = Router(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        logits, best, _ = self.head(x)
        return self.after(x) * best.sum() + logits.sum()


def run(layer, steps=1, micro=1, validate=False):
    torch.manual_seed(0)
    model, writer = nn.Sequential(layer, nn.Linear(WIDTH, 1)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [torch.randn(5 + 3 * i, WIDTH) for i in range(micro)]
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]) as session:
        for _ in range(steps):
            for x in batches:
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if validate:
            with torch.no_grad():
                model(batches[0])
    return model, writer, session.summary(), batches


def test_micro_batches_are_weighed_by_their_tokens():
    model, writer, summary, batches = run(Mixture(), micro=3)
    logits, _, chosen = model[0].gate(torch.cat(batches))
    load = nn.functional.one_hot(chosen, EXPERTS).sum(1).double().mean(0)
    mean = logits.double().softmax(-1).mean(0)
    assert writer.value("router_load/0.gate") == pytest.approx(load.numpy())
    assert writer.value("router_entropy/0.gate") == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-6)
    assert writer.value("router_dropped/0.gate") == 0
    assert "router_load" not in summary


def test_validation_is_apart():
    _, writer, _, _ = run(Mixture(), validate=True)
    assert "val/router_load/0.gate" in writer.tags()


WRONG = {
    "other weights": (Mixture(wrong=True), "0.gate is not recorded: its weights do not recompute"),
    "other choices": (
        Mixture(change=lambda chosen: chosen.flip(0)),
        "0 is not recorded: how its tokens get to experts",
    ),
    "written out": (Written(), "0 is not recorded: how its tokens get to experts"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_recompute_is_said_once(kind, caplog):
    layer, line = WRONG[kind]
    _, writer, summary, _ = run(layer, steps=2)
    assert not [tag for tag in writer.tags() if tag.startswith("router_")]
    assert summary.count(line) == caplog.text.count(line) == 1


def test_a_choice_without_experts_is_no_routing():
    _, writer, summary, _ = run(Sampler())
    assert not [tag for tag in writer.tags() if tag.startswith("router_")]
    assert "router_load" not in summary
