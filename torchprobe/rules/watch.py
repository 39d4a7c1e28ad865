"""Runs the rules over each record, in the drain thread, and does what an alert does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from time import time
from typing import Any, Protocol

from torchprobe.records import Record, Value
from torchprobe.rules import showing
from torchprobe.rules.alert import Alert, TrainingAlert
from torchprobe.rules.choosing import Rule, checked_callback, checked_rules, checked_stops, name_of
from torchprobe.rules.conditions import Conditions
from torchprobe.rules.non_finite import NonFinite

MAX_ALERTS = 10_000  # kept in memory; all are counted and shown

_log = logging.getLogger("torchprobe")


class Follower(Protocol):
    """Sees every record, and the alerts that it gave; in the drain thread."""

    def follow(self, record: Record, alerts: Sequence[Alert]) -> None:
        """After the rules, before the writer."""

    def at_rest(self) -> None:
        """The drain has caught up; in the drain thread."""

    def crashed(self, error: BaseException) -> None:
        """The training loop raised; in the training thread."""

    def close(self) -> None:
        """The run has ended."""


class Together(Protocol):
    """Other ranks, which are to stop at the same step."""

    def propose(self, alert: Alert, completed: int) -> None:
        """A rule ends the run; the training thread is held already, after so many steps."""

    def reached(self, completed: int) -> bool:
        """Whether to stop after so many steps. May wait, in the training thread."""


class Watch:
    """Takes each record on its way to the writer and adds what its alerts show.

    rules: see `choosing.Rule`. on_alert: the user's, called with each alert; what it raises is logged once. stops:
    names of rules whose alert ends the run, through `check`. progress: what changes while the run goes on;
    completed: the steps that have ended; together: the other ranks, if there are any. The training thread calls `check`
    only, which reads an attribute.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        on_alert: Callable[[Alert], object] | None = None,
        stops: frozenset[str] = frozenset(),
    ) -> None:
        self.alerts: list[Alert] = []
        self.progress: Callable[[], Hashable] = lambda: None
        self.completed: Callable[[], int] = lambda: 0
        self.together: Together | None = None
        self._rules = [(rule, Conditions()) for rule in rules]
        self._on_alert = on_alert
        self._stops = stops
        self.followers: list[Follower] = []
        self._display = showing.Display()
        self._stop: Alert | None = None
        self._step = 0
        self._callback_failed = False

    def __call__(self, record: Record) -> Record:
        """The record with the alerts in it."""
        self._step = max(self._step, record.step)
        alerts = self._all(lambda rule: rule(record), record.step)
        shown = self._act(alerts) if alerts else self._count(record)
        record = replace(record, values={**record.values, **shown}) if shown else record
        self._tell(lambda follower: follower.follow(record, alerts))
        return record

    def at_rest(self) -> Record | None:
        """Each time that the drain has caught up: a record of alerts about what does not happen, or None."""
        self._tell(lambda follower: follower.at_rest())
        progress = self.progress()
        resting = [(rule, conditions) for rule, conditions in self._rules if hasattr(rule, "at_rest")]
        alerts = self._all(lambda rule: rule.at_rest(self._step, progress), self._step, resting)  # type: ignore[attr-defined]
        if not alerts:
            return None
        record = Record(self._step, time(), self._act(alerts))
        self._tell(lambda follower: follower.follow(record, alerts))
        return record

    @property
    def traces_nan(self) -> bool:
        """Whether a rule wants to know where NaN and inf come from."""
        return any(name_of(rule) == NonFinite.name for rule, _ in self._rules)

    def check(self) -> None:
        """Raise the TrainingAlert that `stop_on=` asked for, once."""
        if self._stop is not None and (self.together is None or self.together.reached(self.completed())):
            stop, self._stop, self._stops = self._stop, None, frozenset()
            raise TrainingAlert(stop)

    @property
    def may_stop(self) -> bool:
        """Whether a rule may end the run."""
        return bool(self._stops)

    def hold(self, alert: Alert) -> int:
        """Let `check` raise this alert from its next call on; the steps completed by then, or one fewer."""
        self._stop = alert
        return self.completed()

    def state_dict(self) -> dict[str, Any]:
        """The number of alerts so far, and what rules with a `state_dict` remember, for a resumed run."""
        rules = {name_of(rule): rule.state_dict() for rule, _ in self._rules if hasattr(rule, "state_dict")}
        return {"alerts": self._display.count, "rules": rules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._display.count = int(state["alerts"])
        for rule, _ in self._rules:
            if hasattr(rule, "load_state_dict") and name_of(rule) in state["rules"]:
                rule.load_state_dict(state["rules"][name_of(rule)])

    def crashed(self, error: BaseException | None) -> None:
        """The training loop raised, and is being left; in the training thread."""
        if error is not None:
            for follower in self.followers:
                follower.crashed(error)

    def close(self) -> None:
        """The run has ended: let followers finish, and a notifier send what it has."""
        self._tell(lambda follower: follower.close())
        close = getattr(self._on_alert, "close", None)
        if close is not None:
            self._guarded(close)

    def _all(
        self, ask: Callable[[Rule], Any], step: int, rules: Sequence[tuple[Rule, Conditions]] | None = None
    ) -> list[Alert]:
        chosen = list(self._rules if rules is None else rules)
        return [alert for rule, conditions in chosen for alert in self._one(ask, step, rule, conditions)]

    def _one(self, ask: Callable[[Rule], Any], step: int, rule: Rule, conditions: Conditions) -> list[Alert]:
        try:
            return _turned(conditions, step, ask(rule))
        except Exception:
            self._rules = [(other, state) for other, state in self._rules if other is not rule]
            _log.exception("rule %s failed and is switched off; training goes on", name_of(rule))
            return []

    def _act(self, alerts: Sequence[Alert]) -> dict[str, Value]:
        self.alerts += alerts[: MAX_ALERTS - len(self.alerts)]
        showing.log(alerts)
        for alert in alerts:
            if alert.rule in self._stops and not alert.ended and self._stop is None:
                completed = self.hold(alert)
                if self.together is not None:
                    self.together.propose(alert, completed)
            if self._on_alert is not None:
                self._guarded(self._on_alert, alert)
        return dict(self._display.values(alerts))

    def _count(self, record: Record) -> dict[str, Value]:
        return {"overview/alerts": float(self._display.count)} if "overview/dropped_records" in record.values else {}

    def _tell(self, what: Callable[[Follower], None]) -> None:
        """Whatever a follower does wrong, alerts go on."""
        for follower in list(self.followers):
            try:
                what(follower)
            except Exception:  # noqa: PERF203 - there is one or none
                self.followers.remove(follower)
                _log.exception("%s failed and is switched off; training goes on", type(follower).__name__)

    def _guarded(self, call: Callable[..., object], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception:
            if not self._callback_failed:
                _log.exception("on_alert failed, which is said once; training goes on")
            self._callback_failed = True


def open_watch(rules: Any, on_alert: Any, stop_on: Any) -> Watch:
    """The watch of an `instrument` call. Raises TypeError or ValueError for an argument that does not fit."""
    chosen = checked_rules(rules)
    return Watch(chosen, checked_callback(on_alert), checked_stops(stop_on, chosen))


def _turned(conditions: Conditions, step: int, found: Iterable[Alert] | Alert | None) -> list[Alert]:
    if found is None:
        return []
    holding = [found] if isinstance(found, Alert) else list(found)
    wrong = next((alert for alert in holding if not isinstance(alert, Alert)), None)
    if wrong is not None:
        raise TypeError(f"a rule returned {wrong!r}; takes torchprobe.Alert objects, an empty list or None")
    return conditions.turn(step, holding)
