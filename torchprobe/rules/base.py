"""What rules are made of: frozen thresholds, what a watcher remembers, what holds since when, numbers by tag."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar, NamedTuple, TypeAlias

from torchprobe.arguments import check_callable, check_count, check_positive
from torchprobe.records import EVIDENCE, Record, Text
from torchprobe.rules.alert import Alert

Found: TypeAlias = "list[Alert] | None"
"""What a watcher returns: the conditions that hold in this record; None when the record does not say."""

LOSS_TAGS = ("train/loss", "loss", "overview/loss")  # the first that a record has is the training loss


@dataclass(frozen=True)
class BuiltIn:
    """Configuration of a rule: thresholds and counts above 0. Raises TypeError or ValueError for others.

    advice: what an alert of it means, what to try, and where that is from. patience: so many evaluated steps in a row
    without its condition end it. reads: tags (`train/loss`), groups (`lr/`) and `EVIDENCE`: about a record with none of
    them it is not asked, since it would return None and keep nothing, or, as a diagnosis, is of other steps. None: of
    any record.
    """

    name: ClassVar[str]
    advice: ClassVar[str]
    patience: ClassVar[int] = 4
    reads: ClassVar[tuple[str, ...] | None] = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(field.default, float):
                check_positive(field.name, getattr(self, field.name))
            elif isinstance(field.default, int):
                check_count(field.name, getattr(self, field.name))
            elif callable(field.default):
                check_callable(field.name, getattr(self, field.name), "a function without arguments")

    def watcher(self) -> Any:
        """Sees the records of one run: the rule itself, unless it has to remember something."""
        return self

    def alert(self, step: int, where: str | None, value: float, threshold: float | None, message: str) -> Alert:
        """One of this rule, with its advice."""
        return Alert(self.name, step, where, value, threshold, message, advice=self.advice)

    def together(self, step: int, ill: Mapping[str, float], threshold: float | None, message: str) -> list[Alert]:
        """One alert for all names of a record with their values, none when there is none: one illness of many."""
        if not ill:
            return []
        where, value = next(iter(ill.items()))
        return [Alert(self.name, step, where, value, threshold, message, members=tuple(ill), advice=self.advice)]


class Memory:
    """A watcher that a resumed run goes on with: keeps plain values."""

    def __init__(self, look: Callable[[Record, dict[str, Any]], Found], reads: tuple[str, ...] | None) -> None:
        self._look, self.reads = look, reads
        self._kept: dict[str, Any] = {}

    def __call__(self, record: Record) -> Found:
        """What holds in this record."""
        return self._look(record, self._kept)

    def state_dict(self) -> dict[str, Any]:
        """What was kept, for a checkpoint."""
        return deepcopy(self._kept)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._kept = deepcopy(dict(state))


@dataclass(frozen=True)
class Remembering(BuiltIn, ABC):
    """A rule that keeps something from record to record."""

    def watcher(self) -> Memory:
        """With nothing kept yet."""
        return Memory(self._look, self.reads)

    @abstractmethod
    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """What holds in this record. kept: plain values, which a checkpoint takes along."""


@dataclass(frozen=True)
class Diagnosis(Remembering):
    """A rule about `Record.evidence`, which names one bug.

    fact: the evidence that `limit` is for, of the whole run or of each module or parameter; it holds above the limit in
    `samples` sampled steps running. serious: whether it is an alert; else a remark, which the log (as information) and
    `session.summary()` show, for what may be meant as it is.
    """

    samples: int = 3

    serious: ClassVar[bool] = True
    fact: ClassVar[str] = ""
    limit: ClassVar[float] = 0.0
    message: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...] | None] = (EVIDENCE,)

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Keeps in how many samples running it held, and where."""
        values = evidence(record, self.fact)
        ill = lasting(kept, {name: value for name, value in values.items() if value > self.limit}, self.samples)
        return self.said(record.step, ill) if values or kept else None

    def said(self, step: int, ill: Mapping[str, float], message: str = "") -> list[Alert]:
        """One alert for all of them; the name "" is that of the whole run."""
        if "" in ill:
            return [self.alert(step, None, ill[""], self.limit or None, message or self.message)]
        return self.together(step, ill, self.limit or None, message or self.message)


def evidence(record: Record, fact: str) -> dict[str, float]:
    """The numbers of a fact by module or parameter; one of the whole run has the name ""."""
    if fact in record.evidence:
        return {"": record.evidence[fact]}
    prefix = f"{fact}/"
    return {tag[len(prefix) :]: value for tag, value in record.evidence.items() if tag.startswith(prefix)}


def lasting(kept: dict[str, Any], holds: Mapping[str, float], samples: int) -> dict[str, float]:
    """What has held so many samples running, this one included; the counts are kept."""
    counts = {name: kept.get(name, 0) + 1 for name in holds}
    kept.clear()
    kept.update(counts)
    return {name: value for name, value in holds.items() if counts[name] >= samples}


_Key: TypeAlias = "tuple[str, str | None]"  # a condition: its rule, and the place or, of many members, what it is


class _Held(NamedTuple):
    """A condition that holds: the alert that it began with, all members since, and evaluated steps running without."""

    alert: Alert
    members: tuple[str, ...]
    step: int
    without: int = 0

    def seen(self, alert: Alert) -> _Held:
        """Again, maybe at other members."""
        return _Held(self.alert, tuple(dict.fromkeys((*self.members, *alert.members))), alert.step)

    def missed(self, step: int) -> _Held:
        """Not at this step, which counts once."""
        return self._replace(step=step, without=self.without + (step != self.step or not self.without))

    def over(self, step: int) -> Alert:
        message = f"not seen any more; it began at step {self.alert.step}"
        return replace(self.alert, step=step, ended=True, message=message, members=self.members, advice="")


class Conditions:
    """The conditions of one rule that hold now; each ends after `patience` evaluated steps in a row without it."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._holding: dict[_Key, _Held] = {}

    def turn(self, step: int, found: Iterable[Alert] | Alert) -> list[Alert]:
        """Alerts of what has begun, and of what has ended.

        An alert that says `ended` by itself ends its condition at once. Raises TypeError or ValueError for what is no
        alert, or one whose numbers are none.
        """
        said = [_plain(alert) for alert in ([found] if isinstance(found, Alert) else found)]
        if not said and not self._holding:
            return []
        now = {_key(alert): alert for alert in reversed(said) if not alert.ended}
        over = {_key(alert) for alert in said if alert.ended} - now.keys()
        begun = [alert for key, alert in reversed(now.items()) if key not in self._holding]
        held = {key: one.seen(now[key]) if key in now else one.missed(step) for key, one in self._holding.items()}
        ended = [one for key, one in held.items() if key in over or one.without >= self._patience]
        self._holding = {key: one for key, one in held.items() if one not in ended}
        self._holding.update((_key(alert), _Held(alert, alert.members, step)) for alert in begun)
        return [*begun, *(one.over(step) for one in ended)]


def _key(alert: Alert) -> _Key:
    return alert.rule, alert.message if alert.members else alert.where


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


def scalar(record: Record, tag: str) -> float | None:
    """The number under a tag, NaN and inf included; None when there is none."""
    value = record.values.get(tag)
    return value if value is None or type(value) is float else float(value) if isinstance(value, Real) else None


def group(record: Record, name: str) -> list[tuple[str, float]]:
    """(module or parameter, number) of each tag `<name>/<module or parameter>`, without validation."""
    found, plain = record.group(name), record.values
    return [(where, float(v)) for where, tag in found if type(v := plain[tag]) is float or isinstance(v, Real)]


def texts(record: Record, name: str) -> list[tuple[str, str]]:
    """(where, Markdown) of each text `<name>/<where>`."""
    found = [(where, record.values[tag]) for where, tag in record.group(name)]
    return [(where, value.markdown) for where, value in found if isinstance(value, Text)]


def first_of(record: Record, tags: tuple[str, ...]) -> tuple[str, float] | None:
    """The first of the tags that the record has, with its number, or None."""
    for tag in tags:
        if tag in record.values and (value := scalar(record, tag)) is not None:
            return tag, value
    return None


def not_finite(record: Record) -> bool:
    """Whether gradients or parameters hold NaN or inf: norms over what is left say little then."""
    return any(map(record.group, ("grad_nonfinite", "parameters_nonfinite", "nonfinite")))
