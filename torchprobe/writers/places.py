"""Where a run's files are made: a local directory, or one in a remote store that may be out of reach for a while."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from torchprobe.writers.files import AppendFile, GrowingFile, RemoteFile

MAX_WAITING = 5  # files: the first ones, which are nearest to a cause
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0  # seconds between attempts while the place is out of reach
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_LOCAL = ("file", "local")
_TRIAL = ".torchprobe.trial"
# s3fs else keeps listings, in which another process's files are missing.
_NO_CACHE: dict[str, dict[str, Any]] = {"s3": {"use_listings_cache": False}}

_log = logging.getLogger("torchprobe")


class FileStore(Protocol):
    """Takes whole files."""

    def put(self, name: str, data: bytes) -> str:
        """A whole file, in place of an older one of this name; its path. Raises OSError; no reader sees half of it."""


class Place(FileStore, Protocol):
    """A directory of files."""

    def check(self) -> None:
        """Raise OSError when nothing can be written here. Leaves no file."""

    def names(self) -> list[str]:
        """The files there are; makes the directory when it is missing. Raises OSError."""

    def make(self, name: str) -> bool:
        """Make the directory `name` here; False when another process was first. A store, which has none, says True."""

    def begin(self, name: str, head: bytes) -> GrowingFile:
        """A new file that starts with `head`. Raises OSError, with no file left."""


def place_of(log_dir: str | os.PathLike[str]) -> Place:
    """The place that a path or URL names.

    Raises TypeError for what is neither, ValueError for a URL of an unknown kind, ImportError for one whose package is
    not installed.
    """
    if not isinstance(log_dir, str | os.PathLike):
        raise TypeError(f"log_dir={log_dir!r} is a {type(log_dir).__name__}: pass the path of a directory, or a URL")
    text = os.fspath(log_dir)
    return RemotePlace(as_url(text)) if is_url(text) else LocalPlace(local_path(text))


class LocalPlace:
    """A local directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def check(self) -> None:
        """See `Place`. Makes the directory when it is missing."""
        with _explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory, buffering=0) as trial:
                trial.write(_TRIAL.encode())

    def names(self) -> list[str]:
        """See `Place`."""
        with _explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            return [path.name for path in self._directory.iterdir()]

    def make(self, name: str) -> bool:
        """See `Place`."""
        with _explained(self._directory):
            try:
                (self._directory / name).mkdir()
            except FileExistsError:
                return False
        return True

    def begin(self, name: str, head: bytes) -> GrowingFile:
        """See `Place`."""
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
        """See `Place`."""
        path = self._directory / name
        unfinished = path.with_suffix(".part")
        with _explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(data)
            unfinished.replace(path)
        return str(path)


class RemotePlace:
    """A directory of a store that fsspec knows, such as `s3://bucket/run`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._filesystem = filesystem_of(url)

    def check(self) -> None:
        """See `Place`. Where objects cannot be deleted again, an empty one stays."""
        self.names()
        path = self.put(_TRIAL, b"")
        with suppress(Exception):
            self._filesystem.rm_file(path)

    def names(self) -> list[str]:
        """See `Place`. A store makes a directory with its first object."""
        try:
            paths = self._filesystem.ls(self._url, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise _unreachable(error, self._url) from error
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def make(self, name: str) -> bool:
        """See `Place`."""
        return True

    def begin(self, name: str, head: bytes) -> GrowingFile:
        """See `Place`."""
        file = RemoteFile(self._filesystem, f"{self._url}/{name}")
        try:
            file.append(head)
        except OSError as error:
            raise _unreachable(error, self._url) from error
        return file

    def put(self, name: str, data: bytes) -> str:
        """See `Place`. A store replaces an object as a whole."""
        path = f"{self._url}/{name}"
        try:
            self._filesystem.pipe_file(path, data)
        except Exception as error:
            raise _unreachable(error, self._url) from error
        return path


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


def is_url(path: str) -> bool:
    """Whether it names a place in a remote store. `file://` is none, and a single letter is a drive."""
    match = _URL.match(path)
    return match is not None and match[1].lower() not in _LOCAL


def protocol_of(url: str) -> str:
    """`s3` for `s3://bucket/run`."""
    return url.partition(":")[0].lower()


def local_path(path: str) -> Path:
    """A local path, also of a `file://` URL."""
    match = _URL.match(path)
    return Path(f"/{path[match.end() :]}" if match else path)


def as_url(path: str) -> str:
    """A URL as it should be: a `Path` has folded `s3://` to `s3:/`."""
    return _URL.sub(lambda match: f"{match[1]}://", path, count=1).rstrip("/")


def filesystem_of(url: str, argument: str = "log_dir=") -> Any:
    """fsspec's file system for a URL. argument: what the URL was given as, for messages.

    Raises ValueError for a URL of an unknown kind, ImportError for one whose package is not installed.
    """
    protocol = protocol_of(url)
    try:
        import fsspec
    except ImportError as error:
        raise _not_installed(url, argument, "fsspec is not installed") from error
    try:
        return fsspec.filesystem(protocol, **_NO_CACHE.get(protocol, {}))
    except ImportError as error:
        raise _not_installed(url, argument, str(error).rstrip(".")) from error
    except ValueError as error:
        raise ValueError(
            f"{argument}{url!r}: fsspec knows no {protocol!r}: use s3://, gs://, az:// or the like"
        ) from error


def _not_installed(url: str, argument: str, reason: str) -> ImportError:
    return ImportError(
        f"{argument}{url!r} needs a package for {protocol_of(url)}:// ({reason}). "
        "pip install 'torchprobe[remote]' brings fsspec, and s3fs for s3://"
    )


def _unreachable(error: Exception, url: str) -> OSError:
    return OSError(f"log_dir={url!r}: cannot write there ({str(error) or type(error).__name__})")


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
