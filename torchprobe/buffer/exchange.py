"""What the drain thread knows of other ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torchprobe.records import Record


class Exchange(Protocol):
    """Steps between their arrival on the host and their record, which wait for other ranks or go to one."""

    patience: float | None
    """The longest that a caller of `flush` or `close` is kept waiting; None: as long as he likes."""

    @property
    def dropped(self) -> int:
        """What was lost on the way, in steps."""

    def summary(self) -> str:
        """How it went with the other ranks, in a few words; empty when there are none."""

    def pause(self) -> float | None:
        """Seconds until `release` is worth another call; None while nothing is under way."""

    def release(self, urgent: bool) -> Iterable[Record]:
        """The records that are complete. urgent: all of them, after a wait that is bounded."""

    def close(self) -> None:
        """Say goodbye to the other ranks."""
