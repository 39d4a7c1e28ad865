"""What rules read from a record: scalars by tag, and which of them is the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import TypeAlias

from torchprobe.records import Record
from torchprobe.rules.alert import Alert

Found: TypeAlias = "list[Alert] | None"
"""What a rule returns: the conditions that hold in this record; None when the record does not say."""

LOSS_TAGS = ("train/loss", "loss", "overview/loss")
"""Tags that hold the training loss; the first that a record has counts."""


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


def positive(argument: str, value: float) -> float:
    """A threshold as given. Raises TypeError or ValueError unless it is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}={value!r}: takes a number above 0, not {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument}={value}: takes a number above 0")
    return value
