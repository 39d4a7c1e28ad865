"""Models over several devices, and several models."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.device import streams
from tests.device.training import Net, batch, everything, scalars, step
from torchprobe.capture.gate import Meter
from torchprobe.testing import MemoryWriter


class Split(nn.Module):
    """Half of it on one device, half on another; both use one shared scale."""

    def __init__(self, first, second):
        super().__init__()
        self.places = torch.device(first), torch.device(second)
        self.low, self.high = nn.Linear(6, 8).to(first), nn.Linear(8, 5).to(second)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True).to(second)

    def forward(self, x):
        x = self.low(x.to(self.places[0], non_blocking=True)).relu().to(self.places[1], non_blocking=True)
        return self.high(self.attention(x, x, x)[0].mean(1))


def trained(first, second):
    torch.manual_seed(0)
    with torch.device("cpu"):
        model, writer = Split(first, second), MemoryWriter()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with torchprobe.instrument(model, writer=writer, probes=everything()):
        for i in range(3):
            x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(i))
            targets = torch.arange(4).to(second)
            optimizer.zero_grad()
            F.cross_entropy(model(x), targets).backward()
            optimizer.step()
    return scalars(writer)


@pytest.mark.parametrize("places", [("fgpu:0", "fgpu:0"), ("cpu", "fgpu:0"), ("fgpu:0", "cpu")], ids=str)
def test_a_model_over_two_devices_gives_what_it_gives_on_one(fgpu, places):
    expected, found = trained("cpu", "cpu"), trained(*places)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok=True), key


def test_rows_of_each_device_go_by_a_stream_of_their_own(fgpu, monkeypatch):
    """Without gradients: torch gives such a device one thread of autograd's, whatever their number."""
    used, copy_out = set(), streams.copy_out
    monkeypatch.setattr(
        streams, "copy_out", lambda host, inner, device: used.add(device) or copy_out(host, inner, device)
    )
    torch.manual_seed(0)
    found = {}
    for places in (("cpu", "cpu"), ("fgpu:0", "fgpu:1")):
        torch.manual_seed(0)
        model, writer = Split(*places), MemoryWriter()
        with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Activations(every=1)]), torch.no_grad():
            model(torch.ones(4, 3, 6))
        found[places] = {key: value for key, value in scalars(writer).items() if "activation" in key[1]}
    assert used == {torch.device("fgpu:0"), torch.device("fgpu:1")}
    here, there = found.values()
    assert len(here) > 5
    assert there == pytest.approx(here, rel=1e-5, abs=1e-7)


def test_two_models_that_train_in_two_threads_keep_their_losses_apart(fgpu):
    """Backward passes of a device run in a thread of autograd's, where the frames of all threads are looked through."""
    expected, found, failures = {}, {}, []

    def train(scale, into, together=None):
        try:
            with fgpu:
                torch.manual_seed(0)
                model, writer = nn.Linear(4, 3), MemoryWriter()
                optimizer = torch.optim.SGD(model.parameters(), 0.0)
                session = torchprobe.instrument(model, writer=writer, probes=[torchprobe.Loss()])
                for i in range(12):
                    optimizer.zero_grad()
                    loss = model(torch.ones(2, 4)).square().mean() * 0.0 + scale + i
                    if together is not None:
                        together.wait(60)
                    loss.backward()
                    optimizer.step()
                session.detach()
                into[scale] = [v for (_, tag), v in sorted(scalars(writer).items()) if tag == "overview/loss"]
        except BaseException as error:
            failures.append(error)
            raise

    for scale in (100.0, 200.0):
        train(scale, expected)
    together = threading.Barrier(2)
    threads = [threading.Thread(target=train, args=(scale, found, together)) for scale in (100.0, 200.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert expected == {scale: [scale + i for i in range(12)] for scale in (100.0, 200.0)}
    assert found == expected
    # The stand-in knows one stream of "the" forward pass, for all threads: what it says of two that train is not so.
    streams.found.clear()


def test_a_model_trained_in_evaluation_mode_is_followed_though_its_backward_runs_in_a_devices_thread(fgpu, caplog):
    torch.manual_seed(0)
    with fgpu:
        model, writer = Net().eval(), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.head.weight.register_hook(lambda gradient: threading.current_thread() and None)  # which makes it known
        with torchprobe.instrument(model, writer=writer, probes=everything()):
            for _ in range(3):
                step(model, optimizer, *batch())
    found = scalars(writer)
    assert {(k, "activation_rms/head") for k in (1, 2, 3)} <= found.keys()
    assert "another thread" not in caplog.text


def test_the_meter_is_empty_when_all_threads_have_left():
    meter, together = Meter(), threading.Barrier(4)

    def enter_and_leave():
        together.wait(30)
        for _ in range(2000):
            with meter, meter:
                pass

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = meter.seconds
    with meter:
        time.sleep(0.02)
    assert meter.seconds - before >= 0.02  # nobody is left inside


def test_a_model_on_a_side_stream_of_the_users(fgpu):
    torch.manual_seed(0)
    side = streams.Stream(fgpu)
    with fgpu, streams.stream(side):
        model, writer = Net(), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        session = torchprobe.instrument(model, writer=writer, probes=everything())
        for _ in range(2):
            step(model, optimizer, *batch())
    streams.current_stream(fgpu).wait_stream(side)
    session.detach()
    assert {(1, "overview/loss"), (2, "overview/loss")} <= scalars(writer).keys()
