"""What the drain thread asks of anything that stores records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torchprobe.records import Record


@runtime_checkable
class Writer(Protocol):
    """Stores records. Called from one background thread only, never from the training thread.

    An OSError from `write` means "not now": the caller keeps the batch and tries again later, so nothing of it may
    have been stored. After any other exception records are handed over one by one, and those that fail are dropped.
    """

    def write(self, records: Sequence[Record]) -> None:
        """Take a batch of records, in step order; afterwards they survive a killed process."""

    def close(self) -> None:
        """Release files. Called once, after the last `write`."""
