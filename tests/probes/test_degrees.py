"""Gradients on their way, as a probe of one's own sees them: of the loss, whatever GradScaler multiplies it with."""

from __future__ import annotations

import pytest
import torch

import torchprobe
from tests.setups.test_amp import SCALE, loss_of, net, scaler
from torchprobe.testing import MemoryWriter


class Squares(torchprobe.Probe):
    """Of outputs' and micro-batches' gradients; `report` gets them by source."""

    source, fields, reduce, degrees = ("output_gradients", "micro_gradients"), ("squares", "parts"), "sum", (2, 0)

    def compute(self, tensor):
        return torch.stack((tensor.double().square().sum(), tensor.new_ones((), dtype=torch.float64)))

    def report(self, name, values):
        for source, row in values.items():
            yield f"{source}/{name}", row["squares"] / row["parts"]


class WithoutDegrees(Squares):
    degrees = None


def squares_of(probe, grad_scaler):
    """What a probe of one's own reports on a step of two micro-batches."""
    torch.manual_seed(1)
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[probe], rules=[]):
        for k in range(2):
            grad_scaler.scale(loss_of(model, k)).backward()
        grad_scaler.step(optimizer)
        grad_scaler.update()
    return {tag: writer.value(tag) for tag in writer.tags() if "gradients" in tag}


def test_gradients_that_a_probe_of_ones_own_sees_are_unscaled_by_their_degrees(caplog):
    bare = squares_of(Squares(every=1), torch.amp.GradScaler("cpu", enabled=False))
    assert {tag.split("/")[0] for tag in bare} == {"output_gradients", "micro_gradients"}
    assert squares_of(Squares(every=1), scaler()) == pytest.approx(bare, rel=1e-5)
    assert "degrees" not in caplog.text
    scaled = squares_of(WithoutDegrees(every=1), scaler())
    assert scaled == pytest.approx({tag: value * SCALE**2 for tag, value in bare.items()}, rel=1e-5)
    for source in Squares.source:
        assert f"WithoutDegrees has no `degrees`: its {source} are of the loss times a scale" in caplog.text


@pytest.mark.parametrize("degrees", [(1, 2, 3), 1])
def test_degrees_are_one_for_each_field(degrees):
    with pytest.raises(TypeError, match=r"Odd\.degrees is .*; takes a tuple of numbers, one per field"):
        type("Odd", (Squares,), {"degrees": degrees})(every=1)
