"""Law 2: training never fails or waits because of us."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from torchprobe.capture.gate import Meter
from torchprobe.rules.alert import TrainingAlert

_log = logging.getLogger("torchprobe")
_P = ParamSpec("_P")


class Stoppable(Protocol):
    """Records until something goes wrong."""

    stopped: bool
    pid: int
    meter: Meter


_S = TypeVar("_S", bound=Stoppable)


def protected(method: Callable[Concatenate[_S, _P], None]) -> Callable[Concatenate[_S, _P], None]:
    """Whatever goes wrong inside, training goes on; recording stops, with one traceback in the log."""

    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if self.stopped or os.getpid() != self.pid:  # a forked child must not write the parent's run
            return
        self.meter.enter()
        try:
            method(self, *args, **kwargs)
        except TrainingAlert:  # what the user asked for
            raise
        except Exception:
            self.stopped = True
            _log.exception("torchprobe failed and stops recording; training goes on")
        finally:
            self.meter.leave()

    functools.update_wrapper(call, method)
    return call
