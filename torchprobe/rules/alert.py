"""What a rule says."""

from __future__ import annotations

from dataclasses import dataclass


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
