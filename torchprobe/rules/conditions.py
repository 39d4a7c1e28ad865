"""From conditions that hold to alerts that are said once when they begin and once when they end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeAlias

from torchprobe.rules.alert import Alert

_Key: TypeAlias = "tuple[str, str | None]"


class Conditions:
    """The conditions of one rule that hold now, by rule name and place."""

    def __init__(self) -> None:
        self._holding: dict[_Key, Alert] = {}

    def turn(self, step: int, holding: Iterable[Alert]) -> list[Alert]:
        """Alerts of what has begun, and of what has ended: held before, and is not among `holding` any more.

        An alert that says `ended` by itself ends its condition.
        """
        now: dict[_Key, Alert] = {}
        for alert in holding:
            if not alert.ended:
                now.setdefault((alert.rule, alert.where), alert)
        begun = [alert for key, alert in now.items() if key not in self._holding]
        over = [alert for key, alert in self._holding.items() if key not in now]
        self._holding = {key: self._holding.get(key, alert) for key, alert in now.items()}
        return [*begun, *(dataclasses.replace(alert, step=step, ended=True) for alert in over)]
