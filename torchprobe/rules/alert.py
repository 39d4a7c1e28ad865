"""What a rule says, once when a condition begins to hold and once when it ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Alert:
    """A condition that began to hold at a step of the run, or ended there.

    where: name of a module or parameter, or None for the whole run. value and threshold: what was seen and what the
    rule takes as its limit (None when there is no limit). `str(alert)` is one line with all of it.
    """

    rule: str
    step: int
    where: str | None
    value: float
    threshold: float | None
    message: str
    ended: bool = False

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        limit = "" if self.threshold is None else f", threshold {self.threshold:g}"
        state = " has ended" if self.ended else ""
        line = f"{self.rule}{state}, step {self.step}{place}: {self.message} (value {self.value:g}{limit})"
        return " ".join(line.split())


class TrainingAlert(RuntimeError):  # noqa: N818 - the name that users were promised
    """Raised at the end of a step, after `optimizer.step()`, when a rule named in `stop_on=` has fired.

    alert: the alert that stopped the run.
    """

    def __init__(self, alert: Alert) -> None:
        super().__init__(str(alert))
        self.alert = alert


class Conditions:
    """The conditions of one watcher that hold now, by rule name and place."""

    def __init__(self) -> None:
        self._holding: dict[tuple[str, str | None], Alert] = {}

    def turn(self, step: int, found: Iterable[Alert] | Alert | None) -> list[Alert]:
        """Alerts of what has begun, and of what has ended: held before, and is not in `found` any more.

        An alert that says `ended` by itself ends its condition; None leaves all as it is. Raises TypeError or
        ValueError for what is no alert, or one whose numbers are none.
        """
        if found is None:
            return []
        now: dict[tuple[str, str | None], Alert] = {}
        for alert in map(_plain, [found] if isinstance(found, Alert) else found):
            if not alert.ended:
                now.setdefault((alert.rule, alert.where), alert)
        begun = [alert for key, alert in now.items() if key not in self._holding]
        over = [alert for key, alert in self._holding.items() if key not in now]
        self._holding = {key: self._holding.get(key, alert) for key, alert in now.items()}
        return [*begun, *(replace(alert, step=step, ended=True) for alert in over)]


_KINDS: dict[str, Any] = {"rule": str, "step": int, "where": str, "value": float, "threshold": float, "message": str}


def _plain(alert: Any) -> Alert:
    """Its numbers as Python's own: those of numpy and torch are no JSON."""
    if not isinstance(alert, Alert):
        raise TypeError(f"a rule returned {alert!r}; takes torchprobe.Alert objects, an empty list or None")
    odd: dict[str, Any] = {}
    for name, kind in _KINDS.items():
        value = getattr(alert, name)
        if not isinstance(value, (kind, int)) and not (value is None and name in ("where", "threshold")):
            odd[name] = kind(value)
    return replace(alert, **odd) if odd else alert
