"""Runs the rules over each record, in the drain thread, and does what an alert does."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from time import time
from typing import Any

from torchprobe.arguments import check_callable
from torchprobe.messages import log as _log
from torchprobe.records import EVIDENCE, Groups, Record, Value, groups_of, of_tags
from torchprobe.rules.alert import Alert, Display, TrainingAlert, log
from torchprobe.rules.base import BuiltIn, Conditions, Memory
from torchprobe.rules.choosing import Rule, Watcher, checked_rules, checked_stops, name_of, watcher_of
from torchprobe.rules.non_finite import NonFinite

MAX_ALERTS = 10_000  # kept in memory; all are counted and shown
_LONGEST_REASON = 300  # characters of an exception in one line
_NO_WAY_OUT = "; no exit or interrupt reaches training from here: stop_on= ends a run"


class Follower:
    """Sees every record, and the alerts that it gave; in the drain thread. Each method may be left out."""

    def follow(self, record: Record, alerts: Sequence[Alert]) -> None:
        """After the rules, before the writer."""

    def at_rest(self) -> None:
        """The drain has caught up; in the drain thread."""

    def crashed(self, error: BaseException) -> None:
        """The training loop raised; in the training thread."""

    def close(self) -> None:
        """The run has ended."""


class Watch:
    """Takes each record on its way to the writer and adds what its alerts show.

    rules: see `choosing.Rule`; each gets a watcher for this run. on_alert: the user's, called with each alert. stops:
    names of rules whose alert ends the run, through `check`. The training thread calls `check` only, which reads an
    attribute. What a rule, `on_alert` or a follower raises, `SystemExit` included, ends that one alone: see `faults`.
    """

    def __init__(
        self, rules: Sequence[Rule], on_alert: Callable[[Alert], object] | None, stops: frozenset[str]
    ) -> None:
        self.alerts: list[Alert] = []
        self.remarks: list[Alert] = []
        """What diagnoses found that may be meant as it is: no alerts."""
        self._slight = {name_of(rule) for rule in rules if not getattr(rule, "serious", True)}
        self._rules: dict[str, tuple[Watcher, Conditions]] = {}
        for rule in rules:
            patience = getattr(rule, "patience", BuiltIn.patience)
            self._rules[_free(name_of(rule), self._rules)] = watcher_of(rule), Conditions(patience)
        self._resting = {name: (w.at_rest, held) for name, (w, held) in self._rules.items() if hasattr(w, "at_rest")}
        self._concerned = of_tags(self._concerned_by)
        self._on_alert = on_alert
        self._stops = stops
        self._followers: dict[str, Follower] = {}
        self._faults: dict[str, str] = {}  # what failed -> why
        self._progress: Callable[[], Hashable] = lambda: None
        self._completed: Callable[[], int] = lambda: 0
        self._propose: Callable[[Alert, int], None] = _nothing
        self._reached: Callable[[int], bool] = lambda completed: True
        self._display = Display()
        self._announced: Callable[[], Mapping[str, Value]] | None = None
        self.stop: Alert | None = None
        """What ends the run at the next call of `check`."""
        self._step = 0

    def follow_clock(self, progress: Callable[[], Hashable], completed: Callable[[], int]) -> None:
        """Take the time from there. progress: changes while the run goes on. completed: the steps that have ended."""
        self._progress, self._completed = progress, completed

    def announce(self, values: Callable[[], Mapping[str, Value]]) -> None:
        """Values that go with the next record: asked for in the drain thread."""
        self._announced = values

    def add_follower(self, follower: Follower) -> None:
        """Show it every record from now on, with its alerts."""
        self._followers[_free(type(follower).__name__, self._followers)] = follower

    def stop_together(self, propose: Callable[[Alert, int], None], reached: Callable[[int], bool]) -> None:
        """Stop at the step at which the other ranks do.

        propose: a rule ends the run; the training thread is held already, after so many steps. reached: whether to stop
        after so many; it may wait, in the training thread.
        """
        self._propose, self._reached = propose, reached

    def __call__(self, record: Record) -> Record:
        """The record with the alerts in it."""
        self._step = max(self._step, record.step)
        groups, rules = self._concerned((EVIDENCE if record.evidence else "", *record.values))
        own = replace(record, groups=groups, values=dict(record.values))  # a rule may change what it gets
        alerts = self._without_remarks(self._ask(rules, record.step, own)) if rules else []
        announced, self._announced = self._announced, None
        first = announced() if announced else {}  # of a run of one step, which ends in its first record, its end counts
        shown = self._act(alerts) if alerts else self._count(record)
        record = replace(record, values={**first, **record.values, **shown}) if first or shown else record
        self._tell(lambda follower: follower.follow(record, alerts))
        return record

    def at_rest(self) -> Record | None:
        """Each time that the drain has caught up: a record of alerts about what does not happen, or None."""
        self._tell(lambda follower: follower.at_rest())
        step, progress = self._step, self._progress()
        alerts = self._ask(self._resting, step, step, progress)
        if not alerts:
            return None
        record = Record(step, time(), self._act(alerts))
        self._tell(lambda follower: follower.follow(record, alerts))
        return record

    @property
    def faults(self) -> list[str]:
        """What failed in this run and why, a short line each, such as `rule mine: ValueError: no`: a new list."""
        return [f"{what}: {why}" for what, why in list(self._faults.items())]

    @property
    def count(self) -> int:
        """The alerts of conditions that have begun, those of a run that is resumed included."""
        return self._display.count

    @property
    def traces_nan(self) -> bool:
        """Whether a rule wants to know where NaN and inf come from."""
        return NonFinite.name in self._rules

    def check(self) -> None:
        """Raise the TrainingAlert that `stop_on=` asked for, once."""
        if self.stop is not None and self._reached(self._completed()):
            stop, self.stop, self._stops = self.stop, None, frozenset()
            raise TrainingAlert(stop)

    @property
    def may_stop(self) -> bool:
        """Whether a rule may end the run."""
        return bool(self._stops)

    def hold(self, alert: Alert) -> int:
        """Let `check` raise this alert from its next call on; the steps completed by then, or one fewer."""
        self.stop = alert
        return self._completed()

    def state_dict(self) -> dict[str, Any]:
        """The number of alerts so far, and what rules with a `state_dict` remember, for a resumed run."""
        states = {
            name: self._safely(f"rule {name}", watcher.state_dict, only=Exception)  # in the training thread
            for name, (watcher, _) in self._rules.items()
            if hasattr(watcher, "state_dict")
        }
        kept = {name: state for name, state in states.items() if state is not None}
        return {"alerts": self._display.count, "rules": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises what a rule raises for a state that is none of its own."""
        self._display.restore(int(state["alerts"]))
        for name, (watcher, _) in self._rules.items():
            if hasattr(watcher, "load_state_dict") and name in state["rules"]:
                watcher.load_state_dict(state["rules"][name])

    def crashed(self, error: BaseException | None) -> None:
        """The training loop raised, and is being left; in the training thread."""
        if error is not None:
            self._tell(lambda follower: follower.crashed(error), only=Exception)

    def close(self) -> None:
        """The run has ended: let followers finish, and a notifier send what it has."""
        self._tell(lambda follower: follower.close())
        self._safely("on_alert.close", lambda: getattr(self._on_alert, "close", _nothing)())

    def _concerned_by(self, tags: tuple[str, ...]) -> tuple[Groups, Mapping[str, Any]]:
        """The groups of tags, and who reads any of these; the first is `EVIDENCE` where there is some."""
        evidence, *values = tags
        groups = groups_of(values)
        there = {*values, *(f"{group}/" for group in groups)} - {EVIDENCE} | {evidence}
        reads = {name: one[0].reads for name, one in self._rules.items() if isinstance(one[0], BuiltIn | Memory)}
        return groups, {n: one for n, one in self._rules.items() if (r := reads.get(n)) is None or there & {*r}}

    def _ask(self, rules: Mapping[str, Any], step: int, *question: Any) -> list[Alert]:
        alerts: list[Alert] = []
        for name, (watcher, conditions) in rules.items():
            found = self._safely(f"rule {name}", watcher, *question)
            if found is not None:  # else the record does not say
                alerts += self._safely(f"rule {name}", conditions.turn, step, found) or ()
        return alerts

    def _without_remarks(self, found: Sequence[Alert]) -> list[Alert]:
        """The alerts; what is only to be mentioned is, once, where it begins."""
        slight = [one for one in found if one.rule in self._slight and not one.ended]
        for one in slight:
            _log.info("%s. %s", one, one.advice)
        self.remarks += slight[: MAX_ALERTS - len(self.remarks)]
        return [alert for alert in found if alert.rule not in self._slight]

    def _act(self, alerts: Sequence[Alert]) -> dict[str, Value]:
        self.alerts += alerts[: MAX_ALERTS - len(self.alerts)]
        log(alerts)
        for alert in alerts:
            if alert.rule in self._stops and not alert.ended and self.stop is None:
                self._propose(alert, self.hold(alert))
            if self._on_alert is not None:
                self._safely("on_alert", self._on_alert, alert, ends=False)
        return dict(self._display.values(alerts))

    def _count(self, record: Record) -> dict[str, Value]:
        return {"overview/alerts": float(self._display.count)} if "overview/dropped_records" in record.values else {}

    def _tell(self, what: Callable[[Follower], None], only: type[BaseException] = BaseException) -> None:
        for name, follower in list(self._followers.items()):  # one may be added meanwhile
            self._safely(name, what, follower, only=only)

    def _safely(
        self,
        what: str,
        call: Callable[..., Any],
        *arguments: Any,
        ends: bool = True,
        only: type[BaseException] = BaseException,
    ) -> Any:
        """What the call returns. None when it raises, which is said once, and ever after if that `ends` it."""
        if ends and what in self._faults:
            return None
        try:
            return call(*arguments)
        except only as error:
            if what not in self._faults:
                self._faults[what] = reason = _reason(error)
                outcome = " and is switched off" if ends else ", which is said once"
                _log.error("%s failed%s (%s); training goes on", what, outcome, reason, exc_info=error)
            return None


def open_watch(rules: Any, on_alert: Any, stop_on: Any) -> Watch:
    """The watch of an `instrument` call. Raises TypeError or ValueError for an argument that does not fit."""
    chosen = checked_rules(rules)
    if on_alert is not None:
        check_callable("on_alert", on_alert, "a function of one alert, or torchprobe.WebhookNotifier(url)", "alert")
    return Watch(chosen, on_alert, checked_stops(stop_on, chosen))


def _nothing(*arguments: Any) -> None:
    """In place of a method that an object need not have."""


def _free(name: str, taken: Mapping[str, object]) -> str:
    """The name, or `name 2` and so on: each of several rules of one name goes on with its own state."""
    names = (f"{name} {number}" if number > 1 else name for number in count(1))
    return next(free for free in names if free not in taken)


def _reason(error: BaseException) -> str:
    words = " ".join("".join(traceback.format_exception_only(error)).split())[:_LONGEST_REASON]
    return words if isinstance(error, Exception) else words + _NO_WAY_OUT
