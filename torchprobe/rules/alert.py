"""What a rule says when a condition begins to hold and when it ends, and how that looks in TensorBoard and the log."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchprobe.messages import log as _log
from torchprobe.records import Text, Value

_LINES = 3  # of one rule in one step, in the log
_LATEST = 20  # alerts in the summary
_LONGEST = 50  # alerts of a step in its text


@dataclass(frozen=True, slots=True)
class Alert:
    """A condition that began to hold at a step of the run, or ended there.

    where: name of a module or parameter, or None for the whole run. value and threshold: what was seen there and what
    the rule takes as its limit (None when there is no limit). members: of an illness that several share, all of them in
    the model's order, `where` being the first. advice: what it means and what to try, with a source. `str(alert)` is
    one line with all of it but the advice.
    """

    rule: str
    step: int
    where: str | None
    value: float
    threshold: float | None
    message: str
    ended: bool = False
    members: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        limit = "" if self.threshold is None else f", threshold {self.threshold:g}"
        numbers = "" if self.ended else f" (value {self.value:g}{limit})"
        state = " has ended" if self.ended else ""
        return " ".join(f"{self.rule}{state}, step {self.step}{self._place()}: {self.message}{numbers}".split())

    def _place(self) -> str:
        if len(self.members) > 1:
            return f" at {self.members[0]} to {self.members[-1]} ({len(self.members)} in all)"
        return f" at {self.where}" if self.where else ""


class TrainingAlert(RuntimeError):  # noqa: N818 - the name that users were promised
    """Raised at the end of a step, after `optimizer.step()`, when a rule named in `stop_on=` has fired.

    alert: the alert that stopped the run.
    """

    def __init__(self, alert: Alert) -> None:
        super().__init__(str(alert))
        self.alert = alert


class Display:
    """Values that show the alerts of a run, step by step."""

    def __init__(self) -> None:
        self.count = 0
        """Of conditions that have begun."""
        self._by_rule: Counter[str] = Counter()
        self._latest: deque[Alert] = deque(maxlen=_LATEST)

    def restore(self, count: int) -> None:
        """Go on from there."""
        self.count = count

    def values(self, alerts: Sequence[Alert]) -> Mapping[str, Value]:
        """Tags of a step with alerts: `alerts`, `alerts_summary`, `overview/alerts`, `alerts/<rule>` at a beginning."""
        begun = [alert.rule for alert in alerts if not alert.ended]
        self.count += len(begun)
        self._by_rule.update(begun)
        self._latest.extend(alerts)
        return {
            **{f"alerts/{rule}": 1.0 for rule in begun},
            "alerts": Text(_listed(alerts)),
            "alerts_summary": Text(self._summary()),
            "overview/alerts": float(self.count),
        }

    def _summary(self) -> str:
        counts = [f"| {rule} | {count} |" for rule, count in self._by_rule.most_common()]
        table = "\n".join(["| rule | alerts |", "| --- | --- |", *counts])
        return f"{table}\n\nThe latest:\n\n{_listed(list(self._latest)[::-1])}"


def log(alerts: Sequence[Alert]) -> None:
    """A warning for each alert; of many from one rule in one step the first few, and their number."""
    rules: defaultdict[tuple[str, bool], list[Alert]] = defaultdict(list)
    for alert in alerts:
        rules[alert.rule, alert.ended].append(alert)
    for (rule, _), those in rules.items():
        for alert in those[:_LINES]:
            _log.warning("%s%s", alert, f". {alert.advice}" if alert.advice else "")
        if len(those) > _LINES:
            _log.warning("%s, step %d: %d more; session.alerts has them", rule, those[0].step, len(those) - _LINES)


def _listed(alerts: Sequence[Alert]) -> str:
    """A list in Markdown, each alert with its advice below it."""
    lines = []
    for alert in alerts[:_LONGEST]:
        lines += [f"- {_escaped(str(alert))}", *([f"    - {_escaped(alert.advice)}"] if alert.advice else [])]
    rest = len(alerts) - _LONGEST
    return "\n".join([*lines, *([f"- and {rest} more"] if rest > 0 else [])])


def _escaped(line: str) -> str:
    """Names with underscores and stars are no Markdown."""
    return line.replace("_", "\\_").replace("*", "\\*").replace("<", "&lt;")
