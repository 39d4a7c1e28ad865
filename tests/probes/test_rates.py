"""Examples and tokens that pass through a model in a second."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.models import Transformer
from torchprobe.testing import MemoryWriter


class Reads(nn.Module):
    """Any inputs; one row of output for each row of the first."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.part = nn.Parameter(torch.ones(1)), part

    def forward(self, x, *others, **more):
        first = x["ids"] if isinstance(x, dict) else x
        return first.reshape(len(first), -1).float().mean(1) * self.weight


def sizes(clock, *inputs, model=None, passes=1, **named) -> tuple[float | None, float | None]:
    """Examples and tokens of a step, in which a second passes."""
    writer, model = MemoryWriter(), model or Reads()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Performance(every=2)]):
        for _ in range(2):
            clock.spend(1.0)
            sum(model(*inputs, **named).sum() for _ in range(passes)).backward()
            optimizer.step()
            optimizer.zero_grad()
    rates = [dict(writer.scalars(f"performance/{what}_per_second")) for what in ("examples", "tokens")]
    return rates[0].get(2), rates[1].get(2)


IDS = torch.zeros(3, 7, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "known"),
    [
        ((torch.ones(3, 7),), (3.0, None)),
        ((torch.ones(3, 2, 8, 8),), (3.0, None)),
        ((IDS,), (3.0, 21.0)),
        ((IDS, torch.ones_like(IDS)), (3.0, 21.0)),  # and an attention mask
        (({"ids": IDS, "mask": IDS > 0},), (3.0, 21.0)),
        ((torch.ones(3, 7), torch.zeros(3, dtype=torch.long)), (3.0, None)),  # and labels, or times
        ((torch.ones(3, 7), IDS), (3.0, None)),  # and a map of labels
        ((torch.zeros(3, 28, 28, dtype=torch.uint8),), (3.0, None)),  # bytes of images
        ((torch.ones(3, 7), torch.zeros(2, 9, dtype=torch.long)), (None, None)),  # nodes of a graph, and edges
        ((IDS, torch.zeros(7, 7)), (None, None)),  # and a causal mask
        ((torch.ones(7),), (None, None)),  # one example, or seven
    ],
)
def test_examples_and_tokens_by_what_a_model_is_called_with(clock, inputs, known):
    assert sizes(clock, *inputs) == known


def test_a_model_that_takes_time_first_has_no_examples(clock):
    assert sizes(clock, torch.ones(3, 7), model=Reads(nn.LSTM(7, 2))) == (None, None)
    assert sizes(clock, torch.ones(3, 7), model=Reads(nn.LSTM(7, 2, batch_first=True))) == (3.0, None)


def test_one_input_that_is_passed_several_times_counts_once(clock):
    assert sizes(clock, torch.ones(3, 7), passes=5) == (3.0, None)


def test_tokens_of_a_language_model():
    model, writer = Transformer(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torchprobe.instrument(model, writer=writer):
        for _ in range(4):
            ids = torch.randint(0, 11, (3, 7))
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    seconds = writer.value("performance/step_seconds", step=4)
    assert writer.value("performance/tokens_per_second", step=4) == pytest.approx(21 / seconds)
    assert writer.value("performance/examples_per_second", step=4) == pytest.approx(3 / seconds)
