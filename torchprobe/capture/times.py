"""Takes the times of a step: by the host's clock, or by events among the work of a GPU, which are read later."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from time import time
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from torchprobe.capture.compat import no_torch_function
from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.outputs import batch_sizes, tensors_in
from torchprobe.naming import all_parameters
from torchprobe.probes.base import Reporter
from torchprobe.probes.performance import SPANS, PerformanceReporter

_MOST = 256  # stretches of one kind in a step: micro-batches


class HostWatch:
    """Seconds of the training thread, without ours."""

    device: torch.device | None = None

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def now(self) -> float:
        """A mark: when what runs now of torchprobe began."""
        return self._meter.clock

    def passed(self, mark: float) -> bool:
        """Whether a mark can be read."""
        return True

    def seconds(self, begin: float, end: float) -> float:
        """Between two marks."""
        return end - begin

    def peak_memory(self) -> float:
        """The most bytes that the process has held so far; NaN where the system does not say."""
        if sys.platform.startswith("linux"):  # not getrusage, in which what started this process counts too
            lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
            return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), math.nan)
        if sys.platform == "darwin":
            import resource

            return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return math.nan


class DeviceWatch:
    """Seconds of one GPU's work, by events among it."""

    def __init__(self, device: torch.device) -> None:
        self.device: torch.device | None = device

    def now(self) -> torch.cuda.Event:
        """A mark in the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        """Whether the GPU has come to a mark. Waits for nothing."""
        return bool(mark.query())

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Between two marks that have passed."""
        return float(begin.elapsed_time(end)) / 1000

    def peak_memory(self) -> float:
        """The most bytes that were allocated so far, or since the user has set that back."""
        return float(torch.cuda.max_memory_allocated(self.device))


def _watch_of(model: nn.Module, meter: Meter) -> Any:
    """What takes the times of a model; None where it is on several devices, or on one whose events are not known."""
    devices = {parameter.device for parameter in all_parameters(model)}
    kinds = [device.type for device in devices]
    return HostWatch(meter) if {*kinds} <= {"cpu"} else DeviceWatch(devices.pop()) if kinds == ["cuda"] else None


class Timing:
    """The times of one step: pairs of marks by what they are of, and how many passes they cover.

    aside: seconds that the user had set aside when it began. clear: nothing but training runs in the step.
    """

    def __init__(self, watch: Any, aside: float, clear: bool) -> None:
        self.watch, self._aside, self._clear = watch, aside, clear
        self._spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in SPANS}
        self._unknown: set[str] = set(SPANS) if watch is None else set()
        self._begun: dict[str, Any] = {}
        self._entered = self._heard = 0  # passes; those of backward passes that were timed
        self._rows = self._tokens = 0.0
        self._input: tuple[ReferenceType[Tensor], int] | None = None
        self._others: tuple[float, ...] = ()  # peak memory and what stands behind it, once the step is over

    def enter(self) -> None:
        """A pass begins."""
        self._entered += 1
        self.begin("forward")

    def begin(self, name: str) -> None:
        """It begins now; of what had begun and has not ended nothing is known."""
        self._unknown |= {name} & self._begun.keys()
        if self.watch is not None:
            self._begun[name] = self.watch.now()

    def end(self, name: str) -> None:
        """It ends now, if it was seen to begin."""
        begun = self._begun.pop(name, None)
        if begun is None:
            self._unknown.add(name)
        else:
            self.add(name, begun, self.watch.now())

    def add(self, name: str, begin: Any, end: Any) -> None:
        """One stretch of it."""
        self._spans[name].append((begin, end))
        if len(self._spans[name]) > _MOST:
            self._spans[name].clear()
            self._unknown.add(name)

    def add_backward(self, begin: Any, passes: int) -> None:
        """A backward pass ends now that has run through so many forward passes."""
        self.add("backward", begin, self.watch.now())
        self._heard += passes

    def forget(self, *names: str) -> None:
        """They are not known of this step."""
        self._unknown.update(names)

    def count(self, inputs: Sequence[Tensor], output: Any) -> None:
        """What a pass was called with; one input that is passed again counts once, as in Monte-Carlo dropout."""
        first = inputs[0] if inputs else None
        version = 0 if first is None or first.is_inference() else first._version
        if first is not None and self._input is not None and self._input[0]() is first and self._input[1] == version:
            return
        self._input = None if first is None else (ref(first), version)
        rows, tokens = batch_sizes(inputs, output)
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens

    def close(self, used: int, quiet: bool, seconds: float, ranks: float, aside: float) -> None:
        """The step is over, which took so many seconds, in a run of so many ranks.

        used: its passes that an optimizer used. quiet: no other probe was at work. aside: seconds set aside by now.
        """
        interrupted = self.watch is None or (self.watch.device is not None and aside != self._aside)
        self._unknown |= {name for name in SPANS if interrupted or name in self._begun or not self._spans[name]}
        counted = used == self._entered > 0
        alone = quiet or self.watch is None or self.watch.device is None  # the host's clock leaves ours out
        self._unknown |= set() if alone and counted else {"forward", "backward"}
        self._unknown |= set() if alone else {"optimizer"}
        self._unknown |= set() if self._heard == used else {"backward"}
        memory = math.nan if self.watch is None else self.watch.peak_memory()
        over = seconds if counted and self._clear and seconds > 0 else math.nan
        self._others = (seconds, memory, ranks, time(), self._rows / over, self._tokens / over, 1.0)

    @property
    def known(self) -> bool:
        """Whether all marks can be read: the device has come to them."""
        spans = [span for name in SPANS if name not in self._unknown for span in self._spans[name]]
        return all(self.watch.passed(mark) for span in spans for mark in span)

    def row(self, known: bool) -> list[float]:
        """As `Performance.fields` says, NaN where unknown. known: its marks can be read."""
        seconds, *others = self._others
        return [seconds, *(self._seconds(name) if known else math.nan for name in SPANS), *others]

    def _seconds(self, name: str) -> float:
        if name in self._unknown:
            return math.nan
        return math.fsum(self.watch.seconds(begin, end) for begin, end in self._spans[name])


class Stopwatch:
    """Takes the times of the steps that the probe samples; at any other step nobody calls it.

    timing: of the open step, where that is timed. reporter: None for a session without the probe.
    """

    def __init__(self, reporter: Reporter | None, model: ReferenceType[nn.Module], meter: Meter, ranks: int) -> None:
        self.meter, self._reporter, self._model, self._ranks = meter, reporter, model, ranks
        self._gate = Gate("Performance", meter) if reporter is None else reporter.gate
        self.timing: Timing | None = None
        self._ended: tuple[int, Any, Any, float] | None = None  # a step, a watch, its mark at the end, seconds aside
        self._by_time: bool | None = None  # whether a module takes the first dimension for time
        self._backward: Any = None  # when the backward pass that runs began
        self._over: tuple[Timing, Any, int] | None = None  # one that is ending

    def mark_end(self, step: int) -> None:
        """A step has ended, perhaps, and the next one may be timed."""
        self._ended, model = None, self._model()
        following = getattr(getattr(self._reporter, "schedule", None), "next", lambda step: step)
        if model is None or self._reporter is None or following(step + 1) > step + 1:
            return
        with self._gate.boundary():
            watch = _watch_of(model, self.meter)
            self._ended = None if watch is None else (step, watch, watch.now(), self.meter.aside)

    def interrupt(self) -> None:
        """Another model is trained meanwhile."""
        self._ended = None

    def open(self, step: int, clear: bool, quiet: bool) -> None:
        """A step has begun that is timed. clear: no validation ran in the one before. quiet: no other probe did."""
        self.timing = self._over = self._backward = None
        model, reporter = self._model(), self._reporter
        ended = self._ended = self._ended if self._ended is not None and self._ended[0] == step - 1 else None
        if model is None or reporter is None:
            return
        with self._gate.boundary():
            watch = ended[1] if ended is not None else _watch_of(model, self.meter)
            device = None if watch is None else watch.device
            cast("PerformanceReporter", reporter).watch(device)
            if ended is None or not (clear and (device is None or quiet)):
                self._ended = None
            self.timing = Timing(watch, self.meter.aside, clear)

    def enter(self) -> None:
        """A training pass begins: the first one ends the wait."""
        timing, ended, self._ended = self._live(), self._ended, None
        if timing is not None:
            with self._gate.boundary():
                timing.enter()
                if ended is not None and (ended[1].device is None or ended[3] == self.meter.aside):
                    timing.add("input_wait", ended[2], ended[1].now())

    def leave(self, args: Any, kwargs: Any, output: Any) -> None:
        """It has returned."""
        timing, model = self._live(), self._model()
        if timing is not None and model is not None:
            with self._gate.boundary(), no_torch_function():
                timing.end("forward")
                if self._by_time is None:
                    self._by_time = any(getattr(part, "batch_first", True) is False for part in model.modules())
                timing.count([] if self._by_time else [*tensors_in((args, kwargs))], output)

    def forget_passes(self) -> None:
        """A pass belongs to the step that was not seen to begin or to end."""
        if self.timing is not None:
            self._ended = None
            self.timing.forget("input_wait", "forward", "backward")

    def backward_begins(self) -> None:
        """Before any gradient of a parameter."""
        self._over, self._backward, timing = None, None, self._live()
        if timing is not None and timing.watch is not None:
            with self._gate.boundary():
                self._backward = timing.watch.now()

    def backward_ends(self, passes: int) -> None:
        """Its gradients are there, but for what others do at its end; it ran through so many passes."""
        if self.timing is not None and self._backward is not None:
            self._over, self._backward = (self.timing, self._backward, passes), None

    def backward_ended(self) -> None:
        """That has run, too."""
        over, self._over = self._over, None
        if over is not None:
            with self._gate.boundary():
                over[0].add_backward(*over[1:])

    def optimizer_begins(self, has_closure: bool) -> None:
        """An optimizer is about to step."""
        timing = self._live()
        if timing is not None:
            with self._gate.boundary():
                timing.forget(*(["optimizer"] if has_closure else []))
                timing.begin("optimizer")

    def optimizer_ends(self) -> None:
        """It has stepped."""
        timing = self._live()
        if timing is not None:
            with self._gate.boundary():
                timing.end("optimizer")

    def close(self, seconds: float, used: int, quiet: bool) -> Timing | None:
        """The timed step is over; None when it failed. seconds: of the step. used, quiet: see `Timing.close`."""
        timing, self.timing = self._live(), None
        if timing is not None:
            with self._gate.boundary():
                timing.close(used, quiet, seconds, float(self._ranks), self.meter.aside)
                return timing
        return None

    def _live(self) -> Timing | None:
        """The timing of the open step, unless something of it has failed."""
        if self._gate.failed:
            self.timing = None
        return self.timing
