"""An object of a remote store that grows: stores know no append, so that it is written anew as a whole."""

from __future__ import annotations

from typing import Any

FULL = 4 * 2**20
"""Bytes from which a file is to be followed by another one: what each flush sends, and what is held in memory."""


class RemoteFile:
    """Holds what it has written, and sends all of it at each `append`.

    A store that fails leaves the object as it was (stores replace objects whole) or as it would have been; either way
    the same data can be appended again.
    """

    def __init__(self, filesystem: Any, path: str) -> None:
        self.path = path
        self._filesystem = filesystem
        self._written = b""

    @property
    def full(self) -> bool:
        """Whether the next batch had better go into another file."""
        return len(self._written) >= FULL

    def append(self, data: bytes) -> None:
        """Write all of `data`, or raise OSError."""
        grown = self._written + data
        try:
            self._filesystem.pipe_file(self.path, grown)
        except Exception as error:  # stores have exceptions of their own for a network that is down
            raise OSError(f"{self.path}: {str(error) or type(error).__name__}") from error
        self._written = grown

    def in_place(self) -> bool:
        """Always: an object that was deleted comes back whole with the next `append`."""
        return True

    def close(self) -> None:
        """Free the memory."""
        self._written = b""
