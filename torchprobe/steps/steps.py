"""Which step of the run is open, what it gathers, and how it ends."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torchprobe.buffer.outlet import Outlet, Overview
from torchprobe.buffer.step import SKIPPED_BEFORE
from torchprobe.capture.gate import Meter
from torchprobe.capture.nan_origin.check import Sign, Signs
from torchprobe.capture.optimizers import any_alive, parameter_ids
from torchprobe.capture.sources import Sources
from torchprobe.capture.times import Stopwatch
from torchprobe.naming import all_parameters
from torchprobe.probes.base import Reporter
from torchprobe.probes.performance import STEP_SECONDS
from torchprobe.probes.schedule import every
from torchprobe.records import Value
from torchprobe.steps.backward import Backward
from torchprobe.steps.cadence import Plan
from torchprobe.steps.machine import StepMachine
from torchprobe.steps.open_step import OpenStep, loss_rows
from torchprobe.steps.times import StepTimes

_LISTENING = 8  # steps in which all hooks hear which parts begin them, after one that a new part began


class Steps:
    """The open step and the machine that numbers it: everything that has a value asks here where it goes.

    ranks: of the run; of one alone the loss may travel as a host value. by_methods: others than `forward` train it.
    """

    def __init__(
        self, plan: Plan, sources: Sources, outlet: Outlet, overview: Overview, meter: Meter, ranks: int
    ) -> None:
        self.clock = StepMachine()
        self.current = OpenStep(0)
        self._early = OpenStep(0)  # validation between micro-batches of the open step
        self._plan = plan
        self._sources = sources
        self._outlet = outlet
        self._overview = overview
        self._host_loss = ranks == 1
        timer = next((reporter for reporter in plan.reporters if reporter.source == "performance"), None)
        self.watch = Stopwatch(timer, sources.model, meter, ranks)
        self._times = None if timer is None else StepTimes(timer, self.watch, outlet, ranks)
        self._ended: float | None = None  # when the last step did
        self._signs = Signs(sources.nan_seen)
        self._for_first: list[tuple[str, Value | Tensor]] = []  # logged before step 1 began
        self._looked = self.by_methods = False
        self._given = {*map(id, all_parameters(sources.model()))}  # not of a `functional_call`
        self.has_validated, self._weights = False, 0  # in the open step, and of which one
        self._decided = 0  # the step that was decided on last
        self._due: frozenset[Reporter] = frozenset()  # in that step
        self._doubts = sources.nan_check
        self._unsampled = [r for r in plan.reporters if not (r.probe.sampled or r.source == "performance")]
        self._light: frozenset[Reporter] = frozenset()
        self._always_light = False  # they are due at every step, and the loss is one
        self._resting: frozenset[Reporter] | None = None  # due in validation when nothing was due in training last
        self._listening = 0

    @property
    def due_in_validation(self) -> frozenset[Reporter]:
        """Whose rows the next validation pass gives."""
        return self._plan.due_in_validation

    def due_in(self, number: int) -> frozenset[Reporter]:
        """What a step samples, decided once, when it is first asked for."""
        if number != self._decided:
            self._decide(number)
        return self._due

    def optimizer_stepped(self, optimizer: Optimizer) -> None:
        """It has a say in what the next step samples, which compiled graphs must know now."""
        current = self.current
        if self.has_validated and not current.trained:
            self.end_validation()
            self._plan.validation_ended()
            self.has_validated = False
        if current.due and not current.trained:
            self._plan.await_validation(current.due)
        meter = self.watch.meter
        current.end(at=meter.starts[0] - meter.total[0] - meter.aside)  # its clock, without the call
        self.clock.end(optimizer)
        self._plan.optimizer_stepped(optimizer, current.number)
        if self._times is not None and current.number + 1 not in self._plan.quiet:
            self.watch.mark_end(current.number)
        self._decided = 0
        if current.due and not self.clock.passes_seen:  # a function around the model may be compiled
            self._sources.step_ended()
        if self._sources.running.compiled or self.by_methods:
            self._decide_on(self.clock.following)

    def train_by_methods(self, new: bool = False) -> None:
        """Other methods than `forward` do: hooks must be there before a step begins. new: by a part not seen before."""
        self.by_methods = True
        self._listening = _LISTENING if new else self._listening

    def count_pass(self, with_gradients: bool) -> None:
        """A forward pass was the step."""
        if self.current.due and not self.current.trained:  # what follows belongs to it, and is sampled as it was
            self._plan.await_validation(self.current.due)
        self.current.end(with_gradients, self.watch.meter.clock)
        self.clock.end_by_forward()
        self.watch.mark_end(self.current.number)

    def _decide_on(self, number: int) -> None:
        plan, armed = self._plan, self._sources.armed or (self._doubts is not None and self._doubts.wanted)
        same = number in plan.quiet and plan.by_forward is self.clock.by_forward and not armed
        if not same or plan.due_in_validation is not self._resting:
            self._decide(number)
        self._decided = number

    def _decide(self, number: int) -> None:
        self._decided, plan, clock = number, self._plan, self.clock
        plan.open_for(number, clock.by_forward)
        first = clock.completed - clock.origin <= self._sources.running.in_parts  # or the second: whose passes it has
        self._listening, listens = max(0, self._listening - 1), first or self._listening > 0
        self._due = self._sources.open(number, plan.due, plan.due_in_validation, listens)
        self._resting = None if self._due or first else plan.due_in_validation
        if not self._always_light:
            self._light = frozenset([r for r in self._unsampled if r.gate.train])
            constant = all([r.schedule == every(1) and r in self._light for r in self._unsampled])  # noqa: C419
            self._always_light = constant and bool(self._plan.losses)

    def begin(self) -> None:
        """The machine has begun a step: the one before it is complete."""
        ended, times = self.current, self._times
        before, self._ended = self._ended, ended.ended
        if times is not None and (self.watch.timing is not None or not times.gate.failed):
            if self.watch.timing is not None or self.clock.manual or not self._host_loss:
                self._ended = times.end_step(ended, before, self.clock.manual)
            elif before is not None and self._ended is not None:
                ended.values[STEP_SECONDS] = self._ended - before
        quiet = ended.number > 1 and ended.number % self._outlet.flush_every  # the drain thread need not wake up
        plain = quiet and self._always_light and self._host_loss and (times is None or not times.holds)
        values = ended.take_values() if plain else None
        if values is None:
            self._hand_over(ended)
        else:
            self._outlet.drain.put_values(ended.number, values)
        if self.has_validated:
            self._plan.validation_ended()
        if self.clock.manual:
            self._plan.await_validation(ended.due)
        if (number := self.clock.number) != self._decided:
            self._decide_on(number)
        self.current = OpenStep(number, self._due, self._light)
        if times is not None and times.gate.train:
            self.watch.open(number, not self.has_validated, quiet=not ended.due)
        self.has_validated = False
        if self._for_first:
            self.current.put_all(self._for_first)
            self._for_first = []

    def _hand_over(self, ended: OpenStep, last: bool = False) -> None:
        self._complete(ended, last)
        self._send(ended.number, ended)
        if ended.due and ended.trained:
            self._sources.step_ended()

    def _send(self, number: int, step: OpenStep) -> None:
        (self._times if self._times is not None and self._times.holds else self._outlet).hand_over(number, step.take())

    def write(self) -> None:
        """Hand over what the open step has so far."""
        if self._times is not None:
            self._times.release()
        self._complete(self.current, last=True)
        self._outlet.hand_over(self.current.number, self.current.take())

    def _complete(self, step: OpenStep, last: bool) -> None:
        if step.due or step.used:
            self._gather(step, last)
        loss = None if step.loss is None else step.take_loss()
        if isinstance(loss, float) and self._host_loss:
            step.values["overview/loss"] = loss
        elif loss is not None:
            losses = [reporter for reporter in self._plan.losses if reporter in step.light]
            step.extend([loss_rows(reporter, loss) for reporter in losses])
        if step.trained and not step.reported:
            if step.due or not step.loss_written:
                seldom = self._sources.running.compiled or self.by_methods  # hooks inside, where a step samples
                step.report(self._plan.reporters, () if seldom and not step.due else self._plan.losses)
            if step.number % self._outlet.flush_every == 0:
                self.put_overview()

    def _gather(self, step: OpenStep, last: bool) -> None:
        kept: dict[Any, Any] = {}
        for backward in step.take_used():
            backward.settle(self._sources.merge)
            kept = self._sources.merge(kept, backward.kept) if kept else backward.kept
            backward.forget()
        if kept:
            step.extend(self._sources.rows(kept, True, step.due, step.scale))
        if self._sources.in_place.used:
            step.extend(self._sources.in_place.take(step.number, step.forwards, step.scale, self._sources.scaled))
        step.extend(self._sources.settled(last))

    def settle_parameters(self) -> None:
        """An optimizer is about to step again in the open step, or other weights come."""
        self.current.extend(self._sources.settled() if self.current.due and self.current.trained else ())

    # ---- where values go

    def put(self, tag: str, value: Value | Tensor) -> None:
        """A value that the user logs: of the iteration that runs, or that has just ended."""
        if self.clock.number == 0 and not self.clock.manual:
            self._for_first.append((tag, value))
        else:
            self.current.put(tag, value)

    def validated(self, kept: dict[Any, Any], weights: int | None = None, more: bool = False) -> None:
        """What validation kept. weights: the step whose it had, by default the last. more: of the batch may follow."""
        self.has_validated, self._weights = True, self.clock.completed if weights is None else weights
        if kept:
            for piece in self._sources.rows(kept, False, self.due_in_validation):
                self._validates().add(piece)
        self._plan.validated(more)
        if self.by_methods or self.clock.fresh:
            self._sources.arm(self.due_in(self.clock.following), self.clock.fresh)

    def end_validation(self) -> None:
        """A whole validation pass is over, or is to be written as far as it goes."""
        if self.has_validated:
            self._validates().extend(self._sources.predictions.end_validation())
            if self._early.pieces:
                self._send(self._weights, self._early)

    def _validates(self) -> OpenStep:
        return self._early if self.current.number > self._weights and not self.clock.manual else self.current

    def put_signs(self, backward: Backward) -> None:
        """The open step uses a backward pass whose numbers are not finite, or on a device may be so."""
        if backward.sign is not None:
            self._put_sign(backward.sign)
        self.current.put_flags(self._signs, backward.flags)

    def _put_sign(self, sign: Sign) -> None:
        self.current.put_sign(sign)
        self._sources.nan_seen()

    def skip(self, sign: Sign | None, flag: Tensor | None, backed_off: bool = False) -> None:
        """Numbers that are not finite were not used: a step was skipped, by a GradScaler or by the user."""
        if flag is not None:
            self.current.put_flags(SKIPPED_BEFORE, {"skipped": flag})
        if sign is not None or backed_off:
            self.clock.skip()
            if sign is not None and not self._sources.scaled():
                self._put_sign(sign)

    def put_overview(self) -> None:
        """What torchprobe says of itself."""
        self.current.put_all(self._overview.values(self.clock.skipped).items())

    def look_for_optimizers(self) -> None:
        """Once: with none in sight, forward passes are the clock."""
        clock = self.clock
        if not (self._looked or clock.optimizer_seen or clock.manual):
            self._looked = True
            clock.count_passes(not self.optimizer_alive())

    def optimizer_alive(self) -> bool:
        """Whether an optimizer holds a parameter of the model."""
        model = self._sources.model()
        return model is not None and any_alive(parameter_ids(model) | self._given)

    def forget_passes(self) -> None:
        """Passes that were counted as steps came before training."""
        self.clock.forget_passes()
        self.current.become(0)
        self.write()
        self.current = OpenStep(0)
        self._decide(1)

    def finish(self) -> None:
        """Everything that there is, and the counts."""
        if not self.clock.fresh:
            self.put_overview()
        times, last = self._times, self.current
        if times is not None and last.ended is not None and not (self.clock.manual or times.gate.failed):
            times.end_step(last, self._ended, by_hand=False)
            if times.holds:
                self._hand_over(last, last=True)
        if self._for_first:
            self.write()
            self.current = OpenStep(1)
            self.current.put_all(self._for_first)
        self.write()

    def resume(self) -> None:
        """The machine and the plan were set to where another process stopped."""
        self._looked = True
        self._decide(self.clock.following)
        begun = self.clock.number == self.clock.following
        self.current = OpenStep(self.clock.number, self._due, self._light) if begun else OpenStep(self.clock.number)
