"""Modules of a list as members of one prediction: whatever is in them and however they are averaged, but for a gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.probes.uncertain import bald, found, watch
from torchprobe.testing import MemoryWriter

MEMBERS, CLASSES, ROWS = 4, 5, 32


class Gated(nn.Module):
    """A member that multiplies inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x) * self.b(x).sigmoid())


class Model(nn.Module):
    """Members behind a trunk of their own."""

    def __init__(self, of: Callable[[Model, Sequence[Tensor]], Tensor]) -> None:
        super().__init__()
        self.trunk, self.members, self.of = nn.Linear(8, 8), nn.ModuleList(Gated() for _ in range(MEMBERS)), of
        self.gate = nn.Parameter(torch.zeros(MEMBERS))

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        return self.of(self, [member(h) for member in self.members])


def one_by_one(model: Model, z: Sequence[Tensor]) -> Tensor:
    whole = torch.empty(MEMBERS, ROWS, CLASSES)
    for i, scores in enumerate(z):
        whole[i] = scores
    return whole.mean(0)


def by_lerp(model: Model, z: Sequence[Tensor]) -> Tensor:
    mean = z[0]
    for i, scores in enumerate(z[1:], 2):
        mean = mean.lerp(scores, 1 / i)
    return mean


MEANS = {
    "stacked": lambda m, z: torch.stack(z).mean(0),
    "written one by one": one_by_one,
    "a running mean": by_lerp,
    "by constants": lambda m, z: torch.tensordot(torch.full((MEMBERS,), 1 / MEMBERS), torch.stack(z), 1),
    "of probabilities": lambda m, z: torch.stack(z).log_softmax(-1).logsumexp(0) - math.log(MEMBERS),
}
GATES = {
    "a matrix and a vector": lambda m, z: torch.stack(z, -1) @ m.gate.softmax(-1),
    "a product": lambda m, z: (torch.stack(z, -1) * m.gate.softmax(-1)).sum(-1),
    "a sum of products": lambda m, z: torch.addcmul(0 * z[0], torch.stack(z).mean(0), 1 + m.gate[0]),
}


def ran(model: nn.Module, x: Tensor) -> MemoryWriter:
    """A training step, and a batch of validation after it."""
    writer, loss, y = MemoryWriter(), nn.CrossEntropyLoss(), torch.randint(0, CLASSES, (ROWS,))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with watch(model, writer):
        loss(model(x.clone()), y).backward()
        optimizer.step()
        with torch.no_grad():
            loss(model.eval()(x.clone()), y)
    return writer


@pytest.mark.parametrize("of", MEANS.values(), ids=MEANS)
def test_members_of_any_kind_are_recognised_by_their_mean_also_without_a_graph(of):
    model, x = Model(of), torch.randn(ROWS, 8)
    writer = ran(model, x)
    with torch.no_grad():
        right = bald(torch.stack([member(model.trunk(x)) for member in model.members]).softmax(-1))
    assert found(writer, "members") == pytest.approx(right, rel=1e-4)
    assert found(writer, "members", prefix="val/") == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("of", GATES.values(), ids=GATES)
def test_a_gate_that_has_not_learned_yet_is_no_mean_nor_is_it_in_validation(of):
    tags = ran(Model(of), torch.randn(ROWS, 8)).tags()
    assert [tag for tag in tags if tag.startswith(("uncertainty", "val/uncertainty")) and "members" in tag] == []
