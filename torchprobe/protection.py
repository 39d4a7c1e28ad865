"""Law 2: training never fails or waits because of us."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from torchprobe.capture.gate import Meter
from torchprobe.rules.alert import TrainingAlert

_log = logging.getLogger("torchprobe")
_P = ParamSpec("_P")


class Guard:
    """Whether a run records, and what that costs the training thread; shared by all that training calls into."""

    def __init__(self, meter: Meter) -> None:
        self.pid = os.getpid()
        self.meter = meter
        self.stopped = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Passes and steps inside are none of the run's."""
        stopped, self.stopped = self.stopped, True
        try:
            yield
        finally:
            self.stopped = stopped


class Guarded(Protocol):
    """Records until something goes wrong."""

    guard: Guard


_G = TypeVar("_G", bound=Guarded)


def protected(method: Callable[Concatenate[_G, _P], None]) -> Callable[Concatenate[_G, _P], None]:
    """Whatever goes wrong inside, training goes on; recording stops, with one traceback in the log."""

    def call(self: _G, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        guard = self.guard
        if guard.stopped or os.getpid() != guard.pid:  # a forked child must not write the parent's run
            return
        guard.meter.enter()
        try:
            method(self, *args, **kwargs)
        except TrainingAlert:  # what the user asked for
            raise
        except Exception:
            guard.stopped = True
            _log.exception("torchprobe failed and stops recording; training goes on")
        finally:
            guard.meter.leave()

    functools.update_wrapper(call, method)
    return call
