"""Files that a run makes, in a local directory or another place: they grow by whole batches, or are put there whole.

What cannot be written in full leaves no trace.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from torchprobe.messages import log as _log

if TYPE_CHECKING:
    from torchprobe.writers.remote import RemoteFile, RemotePlace

LONGEST, LONGEST_PATH = 255, 4095  # bytes of a name on every common file system, and of a path
NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # what no file's name can have
MAX_WAITING = 5  # files: the first ones, which are nearest to a cause
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0  # seconds between attempts while the place is out of reach
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_LOCAL = ("file", "local")
_GONE = {errno.ESTALE: "replaced by another file", errno.EBADF: "closed by the program"}


Place: TypeAlias = "LocalPlace | RemotePlace"
"""A directory of files."""

GrowingFile: TypeAlias = "AppendFile | RemoteFile"
"""A file that takes whole pieces."""


class FileStore(Protocol):
    """Takes whole files."""

    def put(self, name: str, data: bytes) -> str:
        """A whole file, in place of an older one of this name; its path. Raises OSError; no reader sees half of it."""


def located(path: str | os.PathLike[str]) -> Path | str:
    """A local path, also of a `file://` URL; a str for the URL of a place in a remote store, as it should be."""
    text = os.fspath(path)
    match = _URL.match(text)  # a single letter is a drive
    if match is None:
        return Path(text)
    rest = text[match.end() :]
    return Path(f"/{rest}") if match[1].lower() in _LOCAL else f"{match[1]}://{rest}".rstrip("/")


def bytes_of(name: str) -> int:
    """How long a name is for the file system."""
    return len(name.encode(errors="surrogatepass"))


def check_path(argument: str, path: str | os.PathLike[str]) -> None:
    """Raise ValueError for what no file system takes: a NUL character, or too many bytes in all or in one name."""
    text, longest = os.fsdecode(path), max(map(bytes_of, Path(path).parts), default=0)
    if NO_NAME.search(text) or longest > LONGEST or bytes_of(text) > LONGEST_PATH:
        sizes = f"{LONGEST} bytes a name and {LONGEST_PATH} in all"
        takes = f"a path without NUL and half surrogate pairs, {sizes}, such as 'runs/exp1'"
        raise ValueError(f"{argument}={text[:300]!r}: takes {takes}; it has up to {longest} bytes a name")


def place_of(log_dir: str | os.PathLike[str]) -> Place:
    """The place that a path or URL names.

    Raises TypeError for what is neither, ValueError for a URL of an unknown kind, ImportError for one whose package is
    not installed.
    """
    if not isinstance(log_dir, str | os.PathLike):
        raise TypeError(f"log_dir={log_dir!r} is a {type(log_dir).__name__}: pass the path of a directory, or a URL")
    where = located(log_dir)
    if isinstance(where, Path):
        check_path("log_dir", where)
        return LocalPlace(where)
    from torchprobe.writers.remote import RemotePlace

    return RemotePlace(where)


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
        """Whether the next batch had better go into another file: never, for a local one grows as there is room."""
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
        """What became of it since the last `append`, as "deleted"; None while it is there as it was left.

        Raises OSError while the file system does not answer.
        """
        if self._raw.closed:
            return "given up after a failed write"
        try:
            there, held = self.path.stat(), os.fstat(self._descriptor)
        except (FileNotFoundError, NotADirectoryError):
            gone = "moved away" if self._has_inode and os.fstat(self._descriptor).st_nlink else "deleted"
            return gone if self.path.parent.is_dir() else f"{gone} with its directory"
        except OSError as error:
            if error.errno not in _GONE:
                raise
            if error.errno == errno.EBADF:
                self.close()  # before the next file gets this descriptor's number
            return _GONE[error.errno]
        if self._has_inode and not os.path.samestat(there, held):
            return "replaced by another file"
        size = held.st_size if self._has_inode else there.st_size
        if size == self.size:
            return None
        return "cut short" if size < self.size else "written to by another program"

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        try:
            self._raw.close()
        except OSError as error:
            if error.errno != errno.EBADF:  # the program has closed it
                raise

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


class LocalPlace:
    """A local directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()  # wherever the program goes

    def check(self) -> None:
        """Raise OSError when nothing can be written here. Makes the directory when it is missing; leaves no file."""
        with _explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory, buffering=0) as trial:
                trial.write(b"torchprobe")

    def names(self) -> list[str]:
        """The files there are; makes the directory when it is missing. Raises OSError."""
        with _explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            return [path.name for path in self._directory.iterdir()]

    def make(self, name: str) -> bool:
        """Make the directory `name` here; False when another process was first."""
        with _explained(self._directory):
            try:
                (self._directory / name).mkdir()
            except FileExistsError:
                return False
        return True

    def begin(self, name: str, head: bytes) -> AppendFile:
        """A new file that starts with `head`. Raises OSError, with no file left."""
        path = self._directory / name
        with _explained(self._directory):
            file = AppendFile(path, "xb")
            try:
                file.append(head)
            except OSError:
                file.close()
                path.unlink()
                raise
        return file

    def put(self, name: str, data: bytes) -> str:
        """See `FileStore`."""
        path = self._directory / name
        unfinished = path.with_suffix(".part")
        with _explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(data)
            unfinished.replace(path)
        return str(path)


class Outbox:
    """Puts whole files into a place, each as soon as it can. Used by one thread.

    One that cannot be written waits, and is tried again with growing pauses; beyond MAX_WAITING the new one is
    dropped. The first failure is logged. what: how the log calls such a file.
    """

    def __init__(self, place: FileStore, what: str) -> None:
        self.dropped = 0
        self._place = place
        self._what = what
        self._waiting: dict[str, bytes] = {}
        self._retry_at = 0.0
        self._pause = _FIRST_RETRY
        self._failed = False

    def put(self, name: str, data: bytes) -> None:
        """Write a file, in place of an older one of this name, now or later."""
        if name in self._waiting or len(self._waiting) < MAX_WAITING:
            self._waiting[name] = data
        else:
            self.dropped += 1
        self.retry()

    def retry(self) -> None:
        """Write what waits, unless the pause after a failure is not over yet."""
        if self._waiting and monotonic() >= self._retry_at:
            self._write()

    def close(self, seconds: float) -> None:
        """Try once more what waits, and give it up after so many seconds: a store may hang as long as it likes."""
        if self._waiting:
            attempt = threading.Thread(target=self._write, name="torchprobe-outbox", daemon=True)
            try:
                attempt.start()
                attempt.join(seconds)
            except RuntimeError:  # the interpreter takes no new thread at its very end
                self._write()
        lost = self.dropped + len(self._waiting)
        if lost:
            _log.error("%d of the run's %ss could not be written and are lost", lost, self._what)

    def _write(self) -> None:
        try:
            for name in list(self._waiting):
                self._place.put(name, self._waiting[name])
                del self._waiting[name]
        except OSError as error:
            if not self._failed:
                _log.warning("a %s could not be written and is tried again: %s", self._what, error)
            self._failed = True
            self._retry_at = monotonic() + self._pause
            self._pause = min(2 * self._pause, _LAST_RETRY)
        else:
            self._pause = _FIRST_RETRY


class FaultLog:
    """Says what became of a file, each kind of fault once: a sync client may replace a file at every write."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def tell(self, path: Path | str, fault: str, successor: Path | str) -> None:
        """A file had this fault, and writing goes on in another one, which may have the same name."""
        if fault not in self._said:
            self._said.add(fault)
            _log.warning("%s was %s: writing goes on in %s", path, fault, "it" if successor == path else successor)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """The same kind of error, saying which argument it is about and what to do."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write there ({error.strerror}): pass a directory with free space that you may write to"
        if isinstance(error, FileExistsError | NotADirectoryError):
            for path in (directory, *directory.parents):
                if path.is_file():
                    problem = f"{str(path)!r} is a file, not a directory: pass another log_dir or move that file away"
        raise OSError(error.errno, f"log_dir={str(directory)!r}: {problem}") from error
