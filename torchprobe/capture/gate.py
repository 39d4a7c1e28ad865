"""The boundaries around a probe and around all of torchprobe: what they cost, and what happens when something fails."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from torchprobe.buffer.transfer import may_record_graphs, records_graph
from torchprobe.capture.compat import switch_gradients
from torchprobe.capture.compiled.private_names import find
from torchprobe.capture.compiled.tracing import DYNAMO_SWITCH, beside, unseen
from torchprobe.messages import log as _log

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Meter:
    """Host seconds spent in torchprobe on the training thread. What runs inside something else counts once.

    starts: when what runs now began, outermost first. total: one number. Both are lists so that what runs at every
    event keeps them itself, which costs no call.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.total = [0.0]
        self.aside = 0.0
        """Seconds in which the user wanted nothing to be recorded."""

    @property
    def seconds(self) -> float:
        """So far."""
        return self.total[0]

    @property
    def clock(self) -> float:
        """Wall time without all that, when what runs now of ours began."""
        return self.starts[0] - self.total[0] - self.aside

    def set_aside(self, seconds: float) -> None:
        """The user wanted nothing of it to be recorded."""
        self.aside += seconds

    def __enter__(self) -> None:
        """Something of ours begins."""
        self.starts.append(0.0 if self.starts else perf_counter())

    def __exit__(self, *raised: object) -> None:
        """It has ended, by an exception or not."""
        start = self.starts.pop()
        if not self.starts:
            self.total[0] += perf_counter() - start


class Gate:
    """One probe's switch. `train` and `val` are plain flags that a compiled graph can guard on.

    fault: why it is switched off for the rest of the run, empty unless `failed`.
    """

    def __init__(self, name: str, meter: Meter) -> None:
        self.name = name
        self.fault = ""
        self.train = False
        self.val = False
        self.failed = False
        self.meter = meter

    def boundary(self) -> Gate:
        """Run probe code: an exception switches the probe off, with one logged traceback.

        The gate itself is entered, as often as need be: a generator would take three times as long, on every layer.
        """
        return self

    def __enter__(self) -> None:
        starts = self.meter.starts
        starts.append(0.0 if starts else perf_counter())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        start = self.meter.starts.pop()
        if not self.meter.starts:
            self.meter.total[0] += perf_counter() - start
        if error is None or not isinstance(error, Exception):
            return False
        self.fail(error)
        return True

    def open_training(self, wanted: bool) -> None:
        """Whether the coming step of training is sampled; never by one that is switched off."""
        self.train = wanted and not self.failed

    def open_validation(self, wanted: bool) -> None:
        """The same for the validation that follows."""
        self.val = wanted and not self.failed

    def switch_off(self, what: str, error: BaseException) -> None:
        """For the rest of the run, since something of the probe's has raised."""
        self.fault = f"{self.name} is left out: its {what} raised {type(error).__name__}"
        self.failed, self.train, self.val = True, False, False

    def fail(self, error: BaseException) -> None:
        """The probe is switched off, and it is said with its traceback."""
        self.switch_off("capture", error)
        _log.error("probe %s failed and is switched off; training goes on", self.name, exc_info=error)


_process = [os.getpid()]
os.register_at_fork(after_in_child=lambda: _process.__setitem__(0, os.getpid()))  # a list costs less than a call


class Guard:
    """Whether a run records, and what that costs the training thread; shared by all that training calls into.

    tell: called with the reason when recording stops by a fault of ours. wanted: what the user asked to be raised.
    captured: how often each method was called while the user captured a graph of a device, and did nothing.
    """

    def __init__(self, meter: Meter, tell: Callable[[str], None], wanted: tuple[type[Exception], ...] = ()) -> None:
        self.pid = os.getpid()
        self.meter = meter
        self.wanted = wanted
        self.stopped = False
        self._tell = tell
        self.captured: Counter[str] = Counter()
        self._while_captured: Callable[[str, tuple[Any, ...]], None] = lambda method, args: None
        self.may_capture = may_record_graphs()
        self.dynamo_switch = find(DYNAMO_SWITCH)
        self._said_forked = False

    def tell_while_captured(self, tell: Callable[[str, tuple[Any, ...]], None]) -> None:
        """Have a function called with the methods that do nothing while a graph is captured, and their arguments."""
        self._while_captured = tell

    def stop(self) -> None:
        """The run is over."""
        self.stopped = True

    def fail(self, error: Exception) -> None:
        """Something of ours went wrong: recording stops, training goes on."""
        self.stopped = True
        _log.exception("torchprobe failed and stops recording; training goes on")
        self._tell(f"{type(error).__name__}: {error}")

    def records(self, method: str, args: tuple[Any, ...] = ()) -> bool:
        """Whether a method is to record: a forked child, and a step that is captured as a graph, say once that not."""
        if self.stopped:
            return False
        if os.getpid() != self.pid:
            if not self._said_forked:
                self._said_forked = True
                _log.warning(
                    "process %d was forked from the one that records: its passes, gradients and steps are not "
                    "recorded; weights that both share are shown as the recording process finds them at its own steps",
                    os.getpid(),
                )
            return False
        if not records_graph():
            return True
        if not self.captured:
            _log.warning(
                "of a step that is captured into a graph of the device, replays record activations, their gradients "
                "and the gradients that an optimizer in it uses, on CUDA with Triton; call session.next_step() after "
                "each replay, unless the optimizer steps outside of the graph"
            )
        self.captured[method] += 1
        try:
            self._while_captured(method, args)
        except Exception as error:
            self.fail(error)
        return False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Passes and steps inside are none of the run's."""
        (stopped, self.stopped), began = (self.stopped, True), perf_counter()
        try:
            yield
        finally:
            self.stopped = stopped
            if not stopped:
                self.meter.set_aside(perf_counter() - began)


class Guarded(Protocol):
    """Records until something goes wrong."""

    guard: Guard


_G = TypeVar("_G", bound=Guarded)


def protected(method: Callable[Concatenate[_G, _P], _R]) -> Callable[Concatenate[_G, _P], _R | None]:
    """Whatever goes wrong inside, training goes on; recording stops, with one traceback in the log.

    Dynamo sees nothing of it, the meter counts it. In place, since each call costs, at every event.
    """

    def call(self: _G, /, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        guard = self.guard
        off = guard.stopped or _process[0] != guard.pid or (guard.may_capture and records_graph())
        if off and not guard.records(method.__name__, args):
            return None
        switch, starts = guard.dynamo_switch, guard.meter.starts
        dynamo = None if switch is None else switch(None)
        starts.append(0.0 if starts else perf_counter())
        try:
            if switch is None:
                return beside(method, self, *args, **kwargs)
            return method(self, *args, **kwargs)
        except Exception as error:
            if isinstance(error, guard.wanted):
                raise
            guard.fail(error)
            return None
        finally:
            start = starts.pop()
            if not starts:
                guard.meter.total[0] += perf_counter() - start
            if switch is not None:
                switch(dynamo)

    functools.update_wrapper(call, method)
    return unseen(call)


class no_graph:  # noqa: N801 - as torch.no_grad
    """`torch.no_grad()`, at a third of its cost: for what runs at every module. To be entered once."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        if self._before:
            switch_gradients(False)

    def __exit__(self, *raised: object) -> None:
        if self._before:
            switch_gradients(True)


_AS_IT_IS = nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Statistics keep their own types inside the user's autocast, on devices that have one."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS
