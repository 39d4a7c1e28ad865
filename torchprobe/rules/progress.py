"""Rules about how a run gets on: validation against training, waiting between steps, standing still."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any, ClassVar

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.base import LOSS_TAGS, BuiltIn, Found, Remembering, first_of, scalar

_STILL = 2 / 3  # of a limit, above which what was said holds
_WAIT, _STEP = "performance/input_wait_seconds", "performance/step_seconds"


@dataclass(frozen=True)
class Overfitting(Remembering):
    """The validation loss is more than `rise` of itself above its smallest while the training loss has fallen since, in
    `validations` running.

    Source: early stopping by generalisation loss over successive validations (Prechelt 1998, GL and UP); 20 % is far
    beyond the noise of a validation, GL of 20. The losses are `val/loss` and the training loss, as the user logs them,
    else `val/calibration/nll` and `calibration/nll`. Training losses are averaged between validations.
    """

    rise: float = 0.2
    validations: int = 3

    name = "overfitting"
    reads = (*LOSS_TAGS, "calibration/nll", "val/loss", "val/calibration/nll")
    patience = 1  # a validation is a judgement by itself
    advice = (
        "What the model still learns holds for its training data alone. Go back to the checkpoint of the smallest "
        "validation loss, and try more data or augmentation, weight decay or dropout, or a smaller model (Prechelt "
        "1998, Early Stopping - But When?)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        found: Found = None
        for tag, training in (("val/loss", LOSS_TAGS), ("val/calibration/nll", ("calibration/nll",))):
            trained, loss = first_of(record, training), scalar(record, tag)
            if trained is None and loss is None:
                continue
            own = kept.setdefault(tag, {"sum": 0.0, "count": 0, "run": 0})
            if trained is not None:
                own["sum"], own["count"] = own["sum"] + trained[1], own["count"] + 1
            if loss is not None and own["count"] and found is None:
                found = self._judge(record.step, loss, own)
        return found

    def _judge(self, step: int, loss: float, own: dict[str, Any]) -> list[Alert]:
        mean = own["sum"] / own["count"]
        own["sum"], own["count"] = 0.0, 0
        if "best" not in own or loss < own["best"]:
            own["best"], own["trained"], own["run"] = loss, mean, 0
            return []
        limit = own["best"] + self.rise * abs(own["best"])
        own["run"] = own["run"] + 1 if loss > limit and mean < own["trained"] else 0
        if own["run"] < self.validations:
            return []
        message = f"the validation loss is far above its smallest, {own['best']:.4g}, while the training loss falls"
        return [self.alert(step, "val", loss, limit, message)]


@dataclass(frozen=True)
class InputBound(Remembering):
    """From the end of a step to the next pass it takes over `share` of the median step, over the last sampled steps.

    Source: the input wait of TraceML. Three quarters of the last `samples` sampled waits have to be above it, each less
    what its step took more than the median of the last `window` steps: what is done every hundredth step alone, such as
    a checkpoint, a stall now and then and a cold start make no run wait. Silent below `least` seconds, and before
    there are `samples`. Once said it holds above two thirds of `share`, lest it come and go.
    """

    share: float = 0.3
    least: float = 0.001
    samples: int = 8  # mostly pairs of steps: four times in the course of a run
    window: int = 128

    name = "input_bound"
    reads = (_STEP,)
    advice: ClassVar[str] = (
        "Training stands still while the next batch is made, or whatever else runs between two steps. Give the data "
        "loader workers that stay (num_workers, persistent_workers, pin_memory), prepare data once instead of at every "
        "step, and move logging and evaluation out of the loop's way (PyTorch, Performance Tuning Guide)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        step, wait = scalar(record, _STEP), scalar(record, _WAIT)
        if step is not None:
            kept["steps"] = [*kept.get("steps", ()), step][-self.window :]
        if step is None or wait is None:
            return None
        kept["waits"] = [*kept.get("waits", ()), [wait, step]][-self.samples :]
        found = self._judge(record.step, kept["waits"], median(kept["steps"]), bool(kept.get("holds")))
        kept["holds"] = bool(found)
        return found

    def _judge(self, step: int, waits: list[Any], usual: float, holds: bool) -> Found:
        wait = sorted(waited - max(0.0, took - usual) for waited, took in waits)[len(waits) // 4]
        limit = max((_STILL if holds else 1.0) * self.share * usual, self.least)
        if len(waits) < self.samples or not usual or not wait > limit:
            return []
        # The wait with its own step: it may be longer than the usual one.
        share, seen, whole = median_low((waited / max(took, waited), waited, took) for waited, took in waits)
        message = f"{seen:.3g} s of a step of {whole:.3g} s pass before its forward pass begins"
        return [self.alert(step, None, share, self.share, message)]


@dataclass(frozen=True)
class Stalled(BuiltIn):
    """No step, and no forward pass of a validation, for `seconds`. Source: SageMaker Debugger.

    Looked at each time that the drain thread wakes up: at least every `flush_seconds`. clock: a monotonic time in
    seconds.
    """

    seconds: float = 1800.0
    clock: Callable[[], float] = time.monotonic

    name = "stalled"
    patience = 1
    advice = (
        "The loop waits for something: a data worker, another rank, a lock, or a debugger. See where with `py-spy "
        "dump --pid <pid>`, and set timeouts for the data loader and the process group (py-spy, README; PyTorch, "
        "torch.distributed)."
    )

    def watcher(self) -> _StalledWatcher:
        """From now on, for one run."""
        return _StalledWatcher(self)


class _StalledWatcher:
    """Remembers since when the progress has been the same."""

    def __init__(self, rule: Stalled) -> None:
        self._rule = rule
        self._last: tuple[Hashable, float] | None = None

    def __call__(self, record: Record) -> None:
        """Records say nothing about their absence."""

    def at_rest(self, step: int, progress: Hashable) -> Found:
        """The same progress as before, for too long?"""
        now = self._rule.clock()
        if self._last is None or self._last[0] != progress:
            self._last = progress, now
        idle = now - self._last[1]
        if idle < self._rule.seconds:
            return []
        return [self._rule.alert(step, None, idle, self._rule.seconds, f"no step for {idle / 60:.0f} minutes")]
