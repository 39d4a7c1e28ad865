"""What built-in rules are made of: frozen thresholds, what a watcher remembers, and numbers of a record by tag."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, TypeAlias

from torchprobe.arguments import check_count
from torchprobe.records import Record
from torchprobe.rules.alert import Alert

Found: TypeAlias = "list[Alert] | None"
"""What a watcher returns: the conditions that hold in this record; None when the record does not say."""

LOSS_TAGS = ("train/loss", "loss", "overview/loss")  # the first that a record has is the training loss


@dataclass(frozen=True)
class BuiltIn:
    """Configuration of a rule: thresholds and counts above 0. Raises TypeError or ValueError for others."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(field.default, float):
                check_positive(field.name, getattr(self, field.name))
            elif isinstance(field.default, int):
                check_count(field.name, getattr(self, field.name))

    def watcher(self) -> Any:
        """Sees the records of one run: the rule itself, unless it has to remember something."""
        return self


class Memory:
    """A watcher that a resumed run goes on with: looks at each record, and keeps plain values in a dict."""

    def __init__(self, look: Callable[[Record, dict[str, Any]], Found]) -> None:
        self._look = look
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


def scalar(record: Record, tag: str) -> float | None:
    """The number under a tag, NaN and inf included; None when there is none."""
    value = record.values.get(tag)
    return float(value) if isinstance(value, Real) else None


def group(record: Record, name: str) -> Iterator[tuple[str, float]]:
    """(module or parameter, number) of each tag `<name>/<module or parameter>`, without validation."""
    prefix = f"{name}/"
    for tag, value in record.values.items():
        if tag.startswith(prefix) and isinstance(value, Real):
            yield tag[len(prefix) :], float(value)


def loss_of(record: Record, tags: tuple[str, ...] = LOSS_TAGS) -> tuple[str, float] | None:
    """The tag and value of the record's loss, or None."""
    found = ((tag, scalar(record, tag)) for tag in tags)
    return next(((tag, value) for tag, value in found if value is not None), None)


def not_finite(record: Record) -> bool:
    """Whether gradients or parameters hold NaN or inf: norms over what is left say little then."""
    return any(tag.startswith(("grad_nonfinite/", "parameters_nonfinite/", "nonfinite/")) for tag in record.values)


def check_positive(argument: str, value: float) -> None:
    """Raises TypeError or ValueError unless a threshold is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}={value!r}: takes a number above 0, not {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument}={value}: takes a number above 0")
