"""A file that grows by whole pieces: one that cannot be written in full leaves no trace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


class AppendFile:
    """Appends without a user-space buffer, so what was appended survives a killed process.

    mode: "xb" for a file that must not exist yet, "ab" for one that may. Raises what `open` raises.
    """

    def __init__(self, path: Path, mode: Literal["xb", "ab"]) -> None:
        self.path = path
        self._raw = path.open(mode, buffering=0)
        self.size = os.fstat(self._raw.fileno()).st_size

    @property
    def full(self) -> bool:
        """Never: a local file may grow as long as there is room."""
        return False

    def append(self, data: bytes) -> None:
        """Write all of `data`, or raise OSError and leave the file as it was."""
        try:
            self._write_all(memoryview(data))
        except BaseException:
            self._rewind()
            raise
        self.size += len(data)

    def in_place(self) -> bool:
        """Whether the file is still there and open: not deleted, moved away or given up."""
        # By name alone: inode numbers are not stable on every network file system.
        return not self._raw.closed and self.path.exists()

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        self._raw.close()

    def _write_all(self, data: memoryview) -> None:
        # A nearly full disk takes a part and says so only at the next write.
        while data:
            data = data[self._raw.write(data) :]

    def _rewind(self) -> None:
        try:
            self._raw.truncate(self.size)
            self._raw.seek(self.size)
        except OSError:
            self.close()  # readers tolerate a torn tail, but nothing may follow it
