"""Law 2: training never fails or waits because of us."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from torchprobe.buffer.transfer import records_graph
from torchprobe.capture.gate import Meter
from torchprobe.rules.alert import TrainingAlert

_log = logging.getLogger("torchprobe")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Guard:
    """Whether a run records, and what that costs the training thread; shared by all that training calls into.

    tell: called with the reason when recording stops by a fault of ours. captured: how often each method was called
    while the user captured a graph, and did nothing.
    """

    def __init__(self, meter: Meter, tell: Callable[[str], None]) -> None:
        self.pid = os.getpid()
        self.meter = meter
        self.stopped = False
        self.captured: Counter[str] = Counter()
        self._tell = tell
        self._said_forked = False

    def stop(self) -> None:
        """The run is over."""
        self.stopped = True

    def fail(self, error: Exception) -> None:
        """Something of ours went wrong: recording stops, training goes on."""
        self.stopped = True
        _log.exception("torchprobe failed and stops recording; training goes on")
        self._tell(f"{type(error).__name__}: {error}")

    def records(self, method: str) -> bool:
        """Whether a method is to record: a forked child, and a step that is captured as a graph, say once that not."""
        if self.stopped:
            return False
        if os.getpid() != self.pid:
            if not self._said_forked:
                self._said_forked = True
                _log.warning("process %d was forked from the one that records: nothing of it is recorded", os.getpid())
            return False
        if not records_graph():
            return True
        if not self.captured:
            _log.warning(
                "what is captured into a graph of the device is not recorded, nor are its replays, which run no Python"
            )
        self.captured[method] += 1
        return False

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


def protected(method: Callable[Concatenate[_G, _P], _R]) -> Callable[Concatenate[_G, _P], _R | None]:
    """Whatever goes wrong inside, training goes on; recording stops, with one traceback in the log."""

    def call(self: _G, /, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        guard = self.guard
        off = guard.stopped or os.getpid() != guard.pid or records_graph()
        if off and not guard.records(method.__name__):  # in place, as the meter is kept: a call costs, at every event
            return None
        starts = guard.meter.starts
        starts.append(0.0 if starts else perf_counter())
        try:
            return method(self, *args, **kwargs)
        except TrainingAlert:  # what the user asked for
            raise
        except Exception as error:
            guard.fail(error)
            return None
        finally:
            start = starts.pop()
            if not starts:
                guard.meter.total[0] += perf_counter() - start

    functools.update_wrapper(call, method)
    return call
