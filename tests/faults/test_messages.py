"""What stands in the log's way costs its lines: training and recording go on."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import nn

import torchprobe
from tests.setups.loops import batch, net
from torchprobe.messages import log
from torchprobe.probes.choosing import default_probes
from torchprobe.testing import MemoryWriter


class Raising(logging.Handler):
    def emit(self, record):
        raise RuntimeError("planted")


class Failing(torchprobe.Probe):
    source, fields, reduce = "outputs", ("value",), "mean"

    def compute(self, tensor):
        raise RuntimeError("planted, and said in the log")

    def report(self, name, values):
        yield f"mine/{name}", values["value"]


class ReportFails(Failing):
    def compute(self, tensor):
        return tensor.mean().reshape(1)

    def report(self, name, values):
        raise RuntimeError("planted, and said in the log by the thread that writes")


@pytest.fixture(params=["a handler that raises", "a closed stderr"])
def in_the_way(request, tmp_path, monkeypatch):
    closed = (tmp_path / "stderr").open("w")
    closed.close()
    handler = Raising() if request.param == "a handler that raises" else logging.StreamHandler(closed)
    if request.param == "a closed stderr":
        monkeypatch.setattr(sys, "stderr", closed)
    logging.getLogger("torchprobe").addHandler(handler)
    yield
    logging.getLogger("torchprobe").removeHandler(handler)


@pytest.mark.parametrize("probe", [Failing, ReportFails])
def test_training_and_recording_go_on(in_the_way, probe):
    torch.manual_seed(0)
    model, writer, losses = net(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)  # raises alerts
    with torchprobe.instrument(model, writer=writer, every=1, probes=[*default_probes(), probe()]):
        for k in range(8):
            loss = nn.functional.mse_loss(model(batch(k)), batch(k, width=2))
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses.append(loss.item())
    assert [value for _, value in writer.scalars("overview/loss")] == pytest.approx(losses, nan_ok=True)
    assert len(writer.scalars("param_norm/0.weight")) == 8
    assert [tag for tag in writer.tags() if tag.startswith("mine/")] == []


def test_a_line_is_the_callers_and_has_its_traceback(caplog):
    try:
        raise KeyError("planted")
    except KeyError:
        log.exception("failed: %s", "this")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("torchprobe", "ERROR", "failed: this")
    assert record.exc_info is not None
