"""Records made by hand, and where alerts say that something is wrong."""

from __future__ import annotations

from torchprobe.records import Record


def record(step: int, **values) -> Record:
    """Two underscores stand for a slash."""
    return Record(step, 0.0, {tag.replace("__", "/"): value for tag, value in values.items()})


def where(found) -> list:
    return [alert.where for alert in found or ()]
