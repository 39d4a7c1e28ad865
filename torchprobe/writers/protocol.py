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

    A writer may have a method `restart(step)`: called once, before the first `write` of a resumed run, whose first
    record can be of this step. Whatever an earlier process wrote from there on is void.
    """

    def write(self, records: Sequence[Record]) -> None:
        """Take a batch of records, in step order; afterwards they survive a killed process."""

    def close(self) -> None:
        """Release files. Called once, after the last `write`."""


def restart(writer: Writer, step: int) -> None:
    """Tell a writer that can act on it that the run was resumed, and at which step it begins."""
    method = getattr(writer, "restart", None)
    if method is not None:
        method(step)
