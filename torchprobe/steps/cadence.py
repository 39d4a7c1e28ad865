"""Which probes sample which step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, cast
from weakref import ref

from torch.optim import Optimizer

from torchprobe.capture.gate import Gate, Meter
from torchprobe.messages import log as _log
from torchprobe.probes.base import Probe, Reporter
from torchprobe.probes.learning_rates import LearningRatesReporter
from torchprobe.probes.schedule import AndBefore, Cadence, Never, Schedule, as_schedule

_ALWAYS = Cadence(1)
_FURTHER = 8  # steps beyond the cadence, at most, for optimizers that take turns


class Plan:
    """The reporters of a session, and their gates, opened and closed when a step begins.

    every: the cadence of each sampled probe that names none of its own. budget: the largest fraction of wall
    time to spend; while more than that is spent, no step is sampled.
    """

    def __init__(
        self, probes: Sequence[Probe], every: int | Schedule | None, budget: float | None, meter: Meter
    ) -> None:
        common = None if every is None else as_schedule("every", every)
        self.reporters: list[Reporter] = []
        self._led: list[Reporter] = []  # by a common cadence, when there is one
        for probe in probes:
            gate = Gate(probe.name, meter)
            led = common is not None and probe.every is None and not probe.always
            schedule = probe.led_by(common) if common is not None and led else probe.schedule
            for reporter in probe.reporter().by_source():
                reporter.begin(gate, schedule)
                self.reporters.append(reporter)
                if probe.every is None and not probe.always:
                    self._led.append(reporter)
        self.descriptions = {group: text for r in self.reporters for group, text in r.descriptions.items()}
        self.rates = [cast("LearningRatesReporter", r) for r in self.reporters if r.source == "optimizers"]
        self.losses = [r for r in self.reporters if r.source == "loss"]
        self.due: frozenset[Reporter] = frozenset()
        self.due_in_validation: frozenset[Reporter] = frozenset()
        self._samplers = _by_schedule(self.reporters)
        self._optimizers = _Optimizers()
        self._budget, self._meter, self._start = budget, meter, monotonic()
        self._awaits_validation = dict.fromkeys(self.reporters)
        self._validating = False  # a pass was sampled since training last went on
        self._step = 0
        self._changes: deque[tuple[Schedule | None, int]] = deque()  # asked for, by other threads too
        self._all_until = 0  # step up to which each is sampled
        self.by_forward = False  # whether forward passes were the clock when the gates were set last
        self.quiet = range(0)  # steps in which the gates stay as they are, unless an optimizer joins
        self._open_validation()

    @property
    def over_ranks(self) -> list[Reporter]:
        """Whose rows several ranks combine: all of them, and what reports beside one."""
        return [one for reporter in self.reporters for one in (reporter, *reporter.beside)]

    def open_for(self, step: int, by_forward: bool = False) -> None:
        """Set the gates for a step that begins; by_forward: each pass is one, validation too. Mostly a microsecond."""
        self._step = step
        if step not in self.quiet or by_forward is not self.by_forward:
            self._open(step, by_forward)

    def optimizer_stepped(self, optimizer: Optimizer, step: int | None = None) -> None:
        """An optimizer of the model has stepped, by default in the step that was opened last. Keeps no hold on it."""
        step = self._step if step is None else step
        seen = self._optimizers.seen.get(id(optimizer))
        if seen is not None and seen[0]() is optimizer:
            seen[1] = step
        elif self._optimizers.meet(optimizer, step):
            self.quiet = range(0)

    def change(self, schedule: Schedule | None = None, sample_next: int = 0) -> None:
        """From the next step on that begins: another common cadence, or so many steps sampled. From any thread."""
        self._changes.append((schedule, sample_next))
        self.quiet = range(0)  # in this order: whoever sets it anew looks at the changes after that

    def await_validation(self, due: Iterable[Reporter]) -> None:
        """A step that sampled these has ended: so will the validation that follows."""
        self._awaits_validation.update(dict.fromkeys(due))
        self._open_validation()

    def validated(self, more: bool = False) -> None:
        """A batch of validation was sampled, or more of it comes: most probes want no other until a sampled step."""
        self._validating = True
        if not more:
            self._close_validation([r for r in self.reporters if r.probe.in_validation != "all"])

    def validation_ended(self) -> None:
        """Training goes on: validation is sampled again after the next sampled step."""
        if self._validating:
            self._validating = False
            self._close_validation(self.reporters)

    def state_dict(self) -> dict[str, Any]:
        """What the cadence cannot tell from a step's number."""
        return {
            "awaits_validation": sorted(reporter.name for reporter in self._awaits_validation),
            "optimizers": self._optimizers.steps(),
            "samplers": [sampler.state() for sampler in self._samplers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        awaiting = set(state["awaits_validation"])
        self.due, self.quiet = frozenset(), range(0)
        self._awaits_validation = dict.fromkeys(r for r in self.reporters if r.name in awaiting)
        self._open_validation()
        self._optimizers = _Optimizers(state.get("optimizers", ()))
        for sampler, values in zip(self._samplers, state.get("samplers", ()), strict=False):
            sampler.load(values)

    def _open(self, step: int, by_forward: bool) -> None:
        self._take_changes(step)
        scheduled = self._scheduled(step)
        due, passing = [], False
        for reporter in self.reporters:
            gate = reporter.gate
            gate.open_training(reporter in scheduled)
            if gate.train and reporter.probe.sampled:
                due.append(reporter)
            elif gate.train and reporter.schedule != _ALWAYS:
                passing = True  # its gate has to be closed again
        self.due = frozenset(due)
        if by_forward:
            self._awaits_validation = dict.fromkeys(due)
            self._open_validation()
        self.by_forward = by_forward
        self.quiet = range(step + 1, min([s.next(step + 1) for s in self._samplers], default=0))
        if due or passing or self._changes:
            self.quiet = range(0)

    def _take_changes(self, step: int) -> None:
        while self._changes:
            schedule, more = self._changes.popleft()
            self._all_until = max(self._all_until, step + more - 1)
            if schedule is not None:
                for reporter in self._led:
                    reporter.begin(reporter.gate, reporter.probe.led_by(schedule))
                self._samplers = _by_schedule(self.reporters)

    def _open_validation(self) -> None:
        in_validation = []
        for reporter in self.reporters:
            gate = reporter.gate
            awaited = reporter in self._awaits_validation
            gate.open_validation(awaited and reporter.probe.in_validation != "never")
            if gate.val:
                in_validation.append(reporter)
        self.due_in_validation = frozenset(in_validation)

    def _scheduled(self, step: int) -> set[Reporter]:
        affordable = step == 1 or not self._over_budget()
        scheduled: set[Reporter] = set()
        for sampler in self._samplers:
            wanted = (affordable or not sampler.costs) and sampler.samples(step, self._optimizers)
            if wanted or (step <= self._all_until and sampler.costs and not isinstance(sampler.schedule, Never)):
                scheduled.update(sampler.reporters)
        return scheduled

    def _close_validation(self, done: Sequence[Reporter]) -> None:
        for reporter in done:
            self._awaits_validation.pop(reporter, None)
            reporter.gate.open_validation(False)
        self.due_in_validation = self.due_in_validation.difference(done)

    def _over_budget(self) -> bool:
        if self._budget is None:
            return False
        return self._meter.seconds > self._budget * (monotonic() - self._start)


class _Optimizers:
    """In which step each optimizer stepped last. resumed: those of the process that this one goes on for, in order."""

    def __init__(self, resumed: Sequence[int] = ()) -> None:
        self.joined = 0  # the last step in which one was first met
        self.seen: dict[int, list[Any]] = {}
        """Weak references and steps, by identity, which a later one may have again."""
        self._resumed = [int(step) for step in resumed]

    def meet(self, optimizer: Optimizer, step: int) -> bool:
        """Note the first step of one. True when it is new to the run."""
        self.seen[id(optimizer)] = [ref(optimizer), step]
        if self._resumed:
            del self._resumed[0]
            return False
        self.joined = step
        return True

    def steps(self) -> list[int]:
        """When each stepped last, in the order in which they were met."""
        self.seen = {key: seen for key, seen in self.seen.items() if seen[0]() is not None}
        return [*(step for _, step in self.seen.values()), *self._resumed]

    def any_between(self, after: int, before: int) -> bool:
        """Whether one stepped last between two steps, both excluded."""
        return any(after < step < before for step in self.steps())


class _Sampler:
    """Reporters that share a schedule, and what was sampled last.

    After a sampled step of a cadence more are, until each optimizer that has stepped since the sampled step before has
    stepped again; and one that was first met in a step that was not sampled is sampled at its next.
    """

    def __init__(self, schedule: Schedule, costs: bool) -> None:
        self.reporters: list[Reporter] = []
        self.schedule = schedule
        self.costs = costs  # whether a budget, and the quiet between sampled steps, hold for it
        self._last = 0  # sampled step
        self._after, self._from = 0, 0  # optimizers that last stepped between these are waited for
        self._further = 0  # steps since that of the cadence
        self._step, self._before = 0, [0, 0, 0, 0]  # the step decided on last, and the state before that

    def samples(self, step: int, optimizers: _Optimizers) -> bool:
        """Whether a step is sampled. Asked again for the same step, it decides anew."""
        if step == self._step:
            self.load(self._before)
        self._step, self._before = step, self.state()
        if self._asked(step):
            self._after, self._from, self._further = min(self._last, step - 1), step, 0
        elif not isinstance(self.schedule, Cadence) or not self._waits(step, optimizers):
            return False
        self._last = step
        return True

    def next(self, step: int) -> int:
        """The first step from `step` on that may be sampled, as far as the schedule tells without being asked."""
        if not isinstance(self.schedule, Cadence | Never | AndBefore):
            return step
        always_open = not self.costs and self.schedule == _ALWAYS
        return Never().next(step) if always_open else self.schedule.next(step)

    def state(self) -> list[int]:
        """For a run that is resumed."""
        return [self._last, self._after, self._from, self._further]

    def load(self, state: Sequence[int]) -> None:
        """Go on from there."""
        self._last, self._after, self._from, self._further = map(int, state)

    def _waits(self, step: int, optimizers: _Optimizers) -> bool:
        if self._further == _FURTHER:
            return False
        if self._last < step - 1 == optimizers.joined:
            self._after, self._from = step - 2, step
        elif self._last != step - 1 or not optimizers.any_between(self._after, self._from):
            return False
        self._further += 1
        return True

    def _asked(self, step: int) -> bool:
        """What the schedule says; a user's that raises switches its probes off."""
        gates = [reporter.gate for reporter in self.reporters]
        if all([gate.failed for gate in gates]):  # noqa: C419 - a generator costs a call a turn
            return False
        try:
            return bool(self.schedule(step))
        except Exception as error:
            names = ", ".join(dict.fromkeys(gate.name for gate in gates))
            _log.exception("the schedule of %s raised, which is switched off; training goes on", names)
            for gate in gates:
                gate.switch_off("schedule", error)
            return False


def _by_schedule(reporters: Sequence[Reporter]) -> list[_Sampler]:
    """Reporters that share a schedule, so that it is asked once; a user's need not be hashable."""
    samplers: list[_Sampler] = []
    for reporter in reporters:
        schedule, costs = reporter.schedule, reporter.probe.sampled
        same = (s for s in samplers if s.costs == costs and (s.schedule is schedule or s.schedule == schedule))
        found = next(same, None)
        if found is None:
            found = _Sampler(schedule, costs)
            samplers.append(found)
        found.reporters.append(reporter)
    return samplers
