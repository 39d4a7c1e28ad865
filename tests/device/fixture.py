"""What a test needs to run on the device that is not there: `from tests.device.fixture import ...` in a conftest."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.device import backend, host_only, streams, tensors, waits
from torchprobe.buffer import transfer
from torchprobe.statistics import dtypes

PLACES = ("cpu", "cuda" if torch.cuda.is_available() else tensors.NAME)


@pytest.fixture
def fgpu(monkeypatch):
    """The device, ready for use: `torch.device("fgpu:0")`. The test fails where our code waits for it, or races it."""
    if backend.MISSING:
        pytest.skip(backend.MISSING)
    backend.set_up()
    streams.clear()
    monkeypatch.setattr(transfer, "OVERLAPPING", transfer.OVERLAPPING | {tensors.NAME})
    monkeypatch.setattr(transfer, "pinned", streams.pinned)
    monkeypatch.setattr(dtypes, "PLAIN", (*dtypes.PLAIN, tensors.DeviceTensor))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "tensor", tensors.tensor)
    yield torch.device(tensors.NAME, 0)
    waited, raced = list(waits.found), list(streams.found)
    streams.clear()
    if waited or raced:
        pytest.fail("\n".join(("our code waited for the device, or raced it:", *waited, *raced)), pytrace=False)


@pytest.fixture
def on_fgpu(fgpu, monkeypatch):
    """What a test makes is on the device, where it does not say otherwise."""
    monkeypatch.setattr(
        torch.testing, "assert_close", functools.partial(torch.testing.assert_close, check_device=False)
    )
    torch.set_default_device(fgpu)
    yield fgpu
    torch.set_default_device(None)


@pytest.fixture
def on_cuda(monkeypatch):
    """The same on a real device, where there is one."""
    monkeypatch.setattr(
        torch.testing, "assert_close", functools.partial(torch.testing.assert_close, check_device=False)
    )
    monkeypatch.setattr(torch, "Generator", OfCuda)
    torch.set_default_device("cuda")
    yield torch.device("cuda")
    torch.set_default_device(None)


def both_places(request):
    """For an autouse fixture with `params=PLACES`: the test as it is, and again on the device."""
    if request.param == "cpu":
        return
    real = request.param == "cuda"
    why = host_only.reason(request.node.nodeid.replace("cuda", tensors.NAME))
    if why and not (real and why in host_only.RUNS_ON_A_REAL_ONE):
        pytest.skip(why)
    if real and any(part in request.node.nodeid for part in host_only.STAND_INS):
        pytest.skip("its kernels are stand-ins that run on the CPU")
    request.getfixturevalue("on_cuda" if real else "on_fgpu")


class Generator(torch.Generator):
    """Of the device too, for which torch's Python backend cannot make one: that of the CPU stands in."""

    def __new__(cls, device="cpu"):
        return super().__new__(torch.Generator, "cpu" if torch.device(device).type == tensors.NAME else device)


class OfCuda(torch.Generator):
    """Of the default device, where a test names none."""

    def __new__(cls, device="cuda"):
        return super().__new__(torch.Generator, device)
