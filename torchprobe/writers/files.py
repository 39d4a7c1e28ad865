"""Files that grow by whole batches, local and remote: one that cannot be written in full leaves no trace."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any, Literal, Protocol

_log = logging.getLogger("torchprobe")

FULL = 4 * 2**20
"""Bytes from which a file is to be followed by another one: what each flush sends, and what is held in memory."""


class GrowingFile(Protocol):
    """A file that takes whole pieces."""

    @property
    def path(self) -> Path | str:
        """Where it is."""

    @property
    def full(self) -> bool:
        """Whether the next batch had better go into another file."""

    def append(self, data: bytes) -> None:
        """Write all of `data`, or raise OSError and leave the file as it was."""

    def fault(self) -> str | None:
        """What became of it since the last `append`, as "deleted"; None while it is there as it was left."""

    def close(self) -> None:
        """Release it; a second call does nothing."""


class AppendFile:
    """Appends without a user-space buffer, so what was appended survives a killed process.

    mode: "xb" for a file that must not exist yet, "ab" for one that may. Raises what `open` raises.
    """

    def __init__(self, path: Path, mode: Literal["xb", "ab"]) -> None:
        self.path = path
        self._raw = path.open(mode, buffering=0)
        self._descriptor = self._raw.fileno()
        self.size = os.fstat(self._descriptor).st_size
        # Some network file systems number one file twice: then the name and the size alone must do.
        self._has_inode = os.path.samestat(path.stat(), os.fstat(self._descriptor))

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

    def fault(self) -> str | None:
        """See `GrowingFile`. Raises OSError while the file system does not answer."""
        if self._raw.closed:
            return "given up after a failed write"
        try:
            there, held = self.path.stat(), os.fstat(self._descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return "deleted" if self.path.parent.is_dir() else "deleted with its directory"
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return "replaced by another file"
        if self._has_inode and not os.path.samestat(there, held):
            return "replaced by another file"
        size = held.st_size if self._has_inode else there.st_size
        if size == self.size:
            return None
        return "cut short" if size < self.size else "written to by another program"

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


class RemoteFile:
    """An object of a store, which knows no append: holds what it has written, and sends all of it at each `append`.

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

    def fault(self) -> str | None:
        """None: an object that was deleted or replaced comes back whole with the next `append`."""
        return None

    def close(self) -> None:
        """Free the memory."""
        self._written = b""


class FaultLog:
    """Says what became of a file, each kind of fault once: a sync client may replace a file at every write."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def tell(self, path: Path | str, fault: str, successor: Path | str) -> None:
        """A file had this fault, and writing goes on in another one, which may have the same name."""
        if fault not in self._said:
            self._said.add(fault)
            _log.warning("%s was %s: writing goes on in %s", path, fault, "it" if successor == path else successor)
