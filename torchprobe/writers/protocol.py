"""What the drain thread asks of anything that stores records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torchprobe.records import Record


@runtime_checkable
class Writer(Protocol):
    """Stores records. Called from one background thread only, never from the training thread.

    `write` may raise: the caller logs it once, keeps the batch and tries again later.
    """

    def write(self, records: Sequence[Record]) -> None:
        """Take a batch of records, in step order; afterwards they survive a killed process."""

    def close(self) -> None:
        """Release files. Called once, after the last `write`."""
