"""Where the time of a step goes, what passes through the model in it, and the memory that it takes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from time import time
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.probes.base import Probe, Reporter, Way
from torchprobe.probes.schedule import AndBefore, Cadence, Schedule
from torchprobe.records import Value

STEP_SECONDS = "performance/step_seconds"
SPANS = ("input_wait", "forward", "backward", "optimizer")
LARGEST = ("step_seconds", *(f"{name}_seconds" for name in SPANS), "peak_memory_bytes")
RATES = ("examples_per_second", "tokens_per_second")
_FRESH = 2.0  # seconds after a step, for which a driver's word on utilisation still is of it

_DESCRIPTION = (
    "step_seconds: wall time between the ends of two steps, at every step. The others on sampled steps. "
    "input_wait_seconds: from the end of a step to the next pass; not where validation ran in between. "
    "forward_seconds: of the training passes; backward_seconds: from a gradient's arrival at the model's output to the "
    "end of the backward pass; optimizer_seconds: of `optimizer.step()`. On a GPU these four are its own time, between "
    "events. What torchprobe takes is left out. peak_memory_bytes: the most so far that was allocated on the GPU; "
    "without one, that the process held. examples_per_second: rows of the model's inputs, by their first dimension; "
    "tokens_per_second: elements of its integer inputs, padding included. gpu_utilisation: in percent, as the driver "
    "says right after the step. Of several ranks: the largest time and memory, the sum of the rates, rank 0's GPU."
)


class Performance(Probe):
    """`performance/step_seconds` at every step; on sampled ones waits, passes, optimizer, rates and memory.

    The step before each sampled one is sampled too (1, 2, 4, 5, 9, 10, 19, 20, 49, 50, …): on a GPU `forward_seconds`,
    `backward_seconds` and `optimizer_seconds` are written only where no other probe makes the step longer (4, 9, 19,
    49, …); on a CPU what these compute is left out, and not what calling their hooks takes, which shows in small
    models. What is not known is not written: the wait before the first step, and after validation;
    the passes of a step of which one was not seen to begin and end (inside a compiled function, in evaluation mode) or
    was not used by an optimizer; an optimizer's step with a closure; examples where the inputs and the output do not
    agree in their first dimension, or a module takes it for time (`batch_first=False`); tokens beside floating-point
    inputs. Costs two numbers a step, and 0.6 ms of a busy CPU in a sampled one. Nothing waits for a device: its events
    are read once they have passed, for which the records of at most 16 steps are kept back.
    """

    source: ClassVar[str] = "performance"
    fields: ClassVar[tuple[str, ...]] = (*LARGEST, "ranks", "wall", *RATES, "parts")
    sampled: ClassVar[bool] = False
    found_everywhere: ClassVar[bool] = False
    combines_many: ClassVar[bool] = True
    over_shards: ClassVar[Way] = "append"
    descriptions: Mapping[str, str] = {"performance": _DESCRIPTION}

    def __init__(self, every: int | Schedule | None = None) -> None:
        super().__init__(every)
        if every is None:
            self.schedule = self.led_by(self.schedule)

    def led_by(self, schedule: Schedule) -> Schedule:
        """Also the step before each: on a GPU, what other probes compute in a sampled step would make it longer."""
        return AndBefore(schedule) if isinstance(schedule, Cadence) else schedule

    def reporter(self) -> Reporter:
        """Which asks the driver, too."""
        return PerformanceReporter(self)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two ranks: the largest times and memory, the sum of rates. What is unknown of one is unknown of both."""
        summed = len(RATES) + 1
        largest = torch.maximum(a[..., :-summed], b[..., :-summed])
        return torch.cat((largest, a[..., -summed:] + b[..., -summed:]), dim=-1)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """What is known. Several rows are of ranks that see the same examples; a rate is that of all ranks or none."""
        columns = dict(zip(self.fields, rows.T, strict=True))
        for name in LARGEST:
            if not np.isnan(columns[name]).any():
                yield f"performance/{name}", float(columns[name].max())
        complete = columns["parts"].sum() == columns["ranks"].max()
        for name in RATES:
            known = columns[name][~np.isnan(columns[name])]
            if complete and known.size:
                yield f"performance/{name}", float(known.min())


class PerformanceReporter(Reporter):
    """Of one session."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        self._device: torch.device | None = None

    def watch(self, device: torch.device | None) -> None:
        """The GPU that the model is on; None for none."""
        self._device = device

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """And what the driver says of this process's GPU, if that is still about a step that was sampled."""
        columns = dict(zip(self.probe.fields, rows.T, strict=True))
        yield from self.probe.report_all(names, rows)
        fresh = time() - columns["wall"].max() < _FRESH and not np.isnan(columns["peak_memory_bytes"]).any()
        used = _utilisation(self._device) if fresh and self._device is not None else None
        if used is not None:
            yield "performance/gpu_utilisation", used


@functools.cache
def driver_is_there() -> bool:
    """Whether a library of a driver's may say how much a GPU is used."""
    return any(find_spec(name) is not None for name in ("pynvml", "amdsmi"))


def _utilisation(device: torch.device) -> float | None:
    """Percent of the last moments in which it computed; None without a library of the driver's. Asks no device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(torch.cuda.utilization(device))
    except Exception:  # the library is missing, or says that it cannot
        return None
