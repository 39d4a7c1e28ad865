"""Once it is known how a plain output is read, sampled steps are spared the other ways, until that changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe
from torchprobe.capture.predictions import capture
from torchprobe.capture.predictions.forms import BINARY, LAST
from torchprobe.capture.predictions.plain_outputs import Settled
from torchprobe.testing import MemoryWriter


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y)


def squared_error(out: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(out, torch.sin(torch.arange(out.numel()).float()).view_as(out))


def several_labels(out: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(out, (torch.arange(out.numel()) % 3 == 0).float().view_as(out))


@pytest.fixture
def judged(monkeypatch):
    """How many forms the gradient of each step was judged for."""
    forms, confirm = [], capture.confirm_gradient
    monkeypatch.setattr(capture, "confirm_gradient", lambda *args: forms.extend(args[1].predicted) or confirm(*args))
    return forms


def run(losses, writer: MemoryWriter, judged: list, probes) -> list[list]:
    """Which forms were judged in each step; every step's rows have arrived before the next one ends."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    with torchprobe.instrument(model, writer=writer, probes=probes, every=1) as session:
        for loss in losses:
            judged.clear()
            loss(model(torch.randn(32, 6)), torch.randint(0, 5, (32,))).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.flush()
            seen.append(list(judged))
    return seen


@pytest.mark.parametrize("probes", [[torchprobe.Uncertainty, torchprobe.Calibration], [torchprobe.Calibration]])
def test_one_form_is_judged_and_all_of_them_at_every_tenth_step(judged, probes):
    writer = MemoryWriter()
    seen = run([cross_entropy] * 24, writer, judged, [probe() for probe in probes])
    assert seen[0] == [LAST, BINARY]
    assert seen[3:9] == [[LAST]] * 6
    assert sum(len(forms) == 2 for forms in seen[3:]) == 2
    assert [step for step, _ in writer.scalars("calibration/ece")] == list(range(1, 25))


@pytest.mark.parametrize(("other", "settles"), [(squared_error, None), (several_labels, BINARY)])
def test_another_loss_is_noticed_at_once(judged, other, settles):
    writer = MemoryWriter()
    seen = run([cross_entropy] * 5 + [other] * 8, writer, judged, [torchprobe.Uncertainty(), torchprobe.Calibration()])
    assert seen[4] == [LAST]
    assert [LAST, BINARY] in seen[6:8]
    steps = [step for step, _ in writer.scalars("calibration/ece")]
    assert 6 not in steps
    assert (13 in steps) == (settles is not None)
    assert [f for f in seen[-1] if settles is not None] == ([] if settles is None else [settles])


def test_what_is_known_changes_nothing_where_it_is_not_possible():
    settled = Settled(lambda: "softmax1")
    settled.next_step()
    assert settled.of([LAST, BINARY]) == [LAST, BINARY]
    assert Settled(lambda: LAST.key).of([LAST, BINARY]) == [LAST, BINARY]
