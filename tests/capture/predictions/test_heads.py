"""Several outputs of one model: the first is judged, and that it is the first alone is said."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


class Heads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.colour, self.shape = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 5)
        self.kind = kind

    def forward(self, x):
        hidden = self.body(x).relu()
        heads = self.colour(hidden), self.shape(hidden)
        return {
            "tuple": heads,
            "list": list(heads),
            "dict": dict(zip(("colour", "shape"), heads, strict=True)),
            "beside weights": (heads[0], hidden.detach()),
            "one": heads[0],
        }[self.kind]


def lines(kind: str, caplog) -> list[str]:
    torch.manual_seed(1)
    model, writer = Heads(kind), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, colours, shapes = torch.randn(48, 6), torch.randint(4, (48,)), torch.randint(5, (48,))
    with caplog.at_level(logging.WARNING), torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        for _ in range(2):
            output = model(x)
            parts = (
                output if isinstance(output, tuple | list) else list(output.values()) if kind == "dict" else [output]
            )
            loss = F.cross_entropy(parts[0], colours)
            if len(parts) > 1 and parts[1].requires_grad:
                loss = loss + F.cross_entropy(parts[1], shapes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    right = F.one_hot(colours, 4).bool()
    assert writer.value("calibration/count", 2) == right.sum()
    return [r.getMessage() for r in caplog.records if "several outputs" in r.getMessage()]


@pytest.mark.parametrize(("kind", "names"), [("tuple", "0, 1"), ("list", "0, 1"), ("dict", "colour, shape")])
def test_of_several_heads_the_first_is_judged_and_that_is_said_once(kind, names, caplog):
    (line,) = lines(kind, caplog)
    assert f"several outputs ({names})" in line


@pytest.mark.parametrize("kind", ["one", "beside weights"])
def test_what_is_not_trained_is_no_head(kind, caplog):
    assert lines(kind, caplog) == []
