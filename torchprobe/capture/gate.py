"""The boundary around a probe: whether it samples now, what it costs, and what happens when it fails."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter

import torch

_log = logging.getLogger("torchprobe")


class Meter:
    """Host seconds spent in torchprobe on the training thread. What runs inside something else counts once.

    starts: when what runs now began, outermost first. total: one number. Both are lists so that what runs at every
    event keeps them itself, which costs no call.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.total = [0.0]

    @property
    def seconds(self) -> float:
        """So far."""
        return self.total[0]

    def enter(self) -> None:
        """Something of ours begins."""
        self.starts.append(0.0 if self.starts else perf_counter())

    def leave(self) -> None:
        """It has ended, by an exception or not."""
        start = self.starts.pop()
        if not self.starts:
            self.total[0] += perf_counter() - start


class Gate:
    """One probe's switch. `train` and `val` are plain flags that a compiled graph can guard on."""

    def __init__(self, name: str, meter: Meter) -> None:
        self.name = name
        self.train = False
        self.val = False
        self.failed = False
        self._meter = meter

    def boundary(self) -> Gate:
        """Run probe code: an exception switches the probe off, with one logged traceback.

        The gate itself is entered, as often as need be: a generator would take three times as long, on every layer.
        """
        return self

    def __enter__(self) -> None:
        self._meter.enter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self._meter.leave()
        if not isinstance(error, Exception):
            return False
        self.fail(error)
        return True

    def fail(self, error: BaseException) -> None:
        """The probe is switched off, and it is said with its traceback."""
        self.failed = True
        self.train = self.val = False
        _log.error("probe %s failed and is switched off; training goes on", self.name, exc_info=error)


def no_graph() -> AbstractContextManager[None]:
    """`torch.no_grad()`, for nothing in a backward pass, which builds none."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Statistics keep their own types inside the user's autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
