"""The boundary around a probe: whether it samples now, what it costs, and what happens when it fails."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter

import torch

_log = logging.getLogger("torchprobe")


class Meter:
    """Host seconds spent in torchprobe on the training thread."""

    def __init__(self) -> None:
        self.seconds = 0.0


class Gate:
    """One probe's switch. `train` and `val` are plain flags that a compiled graph can guard on."""

    def __init__(self, name: str, meter: Meter) -> None:
        self.name = name
        self.train = False
        self.val = False
        self.failed = False
        self._meter = meter

    def boundary(self) -> Boundary:
        """Run probe code: an exception switches the probe off, with one logged traceback."""
        return Boundary(self)

    def took(self, seconds: float) -> None:
        """Count what the probe cost."""
        self._meter.seconds += seconds

    def fail(self, error: Exception) -> None:
        """Switch the probe off."""
        self.failed = True
        self.train = self.val = False
        _log.error("probe %s failed and is switched off; training goes on", self.name, exc_info=error)


class Boundary:
    """Probe code runs inside. A class, since each layer enters one: a generator takes three times as long."""

    __slots__ = ("_gate", "_start")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self._gate.took(perf_counter() - self._start)
        if not isinstance(error, Exception):
            return False
        self._gate.fail(error)
        return True


def no_graph() -> AbstractContextManager[None]:
    """`torch.no_grad()`, for nothing in a backward pass, which builds none."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Statistics keep their own types inside the user's autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
