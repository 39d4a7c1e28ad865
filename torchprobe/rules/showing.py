"""How alerts look in TensorBoard and in the log."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence

from torchprobe.records import Text, Value
from torchprobe.rules.alert import Alert

_LINES = 3  # of one rule in one step, in the log
_LATEST = 20  # alerts in the summary
_LONGEST = 50  # alerts of a step in its text

_log = logging.getLogger("torchprobe")


class Display:
    """Values that show the alerts of a run, step by step."""

    def __init__(self) -> None:
        self.count = 0
        self._by_rule: Counter[str] = Counter()
        self._latest: deque[Alert] = deque(maxlen=_LATEST)

    def values(self, alerts: Sequence[Alert]) -> Mapping[str, Value]:
        """Tags of a step with alerts: `alerts/<rule>`, `alerts`, `alerts_summary`, `overview/alerts`."""
        self.count += len(alerts)
        self._by_rule.update(alert.rule for alert in alerts)
        self._latest.extend(alerts)
        return {
            **{f"alerts/{alert.rule}": 1.0 for alert in alerts},
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
            _log.warning("%s", alert)
        if len(those) > _LINES:
            _log.warning("%s, step %d: %d more; session.alerts has them", rule, those[0].step, len(those) - _LINES)


def _listed(alerts: Sequence[Alert]) -> str:
    lines = [f"- {_escaped(str(alert))}" for alert in alerts[:_LONGEST]]
    rest = len(alerts) - _LONGEST
    return "\n".join([*lines, *([f"- and {rest} more"] if rest > 0 else [])])


def _escaped(line: str) -> str:
    """Names with underscores and stars are no Markdown."""
    return line.replace("_", "\\_").replace("*", "\\*").replace("<", "&lt;")
