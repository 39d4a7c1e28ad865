"""Directories and files of a remote store that fsspec knows, such as `s3://bucket/run`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

FULL = 4 * 2**20
"""Bytes from which a file is to be followed by another one: what each flush sends, and what is held in memory."""

_TRIAL = ".torchprobe.trial"
# s3fs else keeps listings, in which another process's files are missing.
_NO_CACHE: dict[str, dict[str, Any]] = {"s3": {"use_listings_cache": False}}


class RemotePlace:
    """A directory of a store that fsspec knows, such as `s3://bucket/run`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._filesystem = filesystem_of(url)

    def check(self) -> None:
        """See `LocalPlace`. Where objects cannot be deleted again, an empty one stays."""
        self.names()
        path = self.put(_TRIAL, b"")
        with suppress(Exception):
            self._filesystem.rm_file(path)

    def names(self) -> list[str]:
        """See `LocalPlace`. A store makes a directory with its first object."""
        paths: list[str] = []
        with _explained(self._url), suppress(FileNotFoundError):
            paths = self._filesystem.ls(self._url, detail=False, refresh=True)
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def make(self, name: str) -> bool:
        """True: a store has no directories."""
        return True

    def begin(self, name: str, head: bytes) -> RemoteFile:
        """See `LocalPlace`."""
        file = RemoteFile(self._filesystem, f"{self._url}/{name}")
        with _explained(self._url):
            file.append(head)
        return file

    def put(self, name: str, data: bytes) -> str:
        """See `FileStore`. A store replaces an object as a whole."""
        path = f"{self._url}/{name}"
        with _explained(self._url):
            self._filesystem.pipe_file(path, data)
        return path


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


def protocol_of(url: str) -> str:
    """`s3` for `s3://bucket/run`."""
    return url.partition(":")[0].lower()


def filesystem_of(url: str, argument: str = "log_dir=") -> Any:
    """fsspec's file system for a URL. argument: what the URL was given as, for messages.

    Raises ValueError for a URL of an unknown kind, ImportError for one whose package is not installed.
    """
    protocol = protocol_of(url)
    try:
        import fsspec

        return fsspec.filesystem(protocol, **_NO_CACHE.get(protocol, {}))
    except ImportError as error:
        raise ImportError(
            f"{argument}{url!r} needs a package for {protocol}:// ({str(error).rstrip('.')}). "
            "pip install 'torchprobe[remote]' brings fsspec, and s3fs for s3://"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{argument}{url!r}: fsspec knows no {protocol!r}: use s3://, gs://, az:// or the like"
        ) from error


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Stores have exceptions of their own: the same as an OSError that says which argument it is about."""
    try:
        yield
    except Exception as error:
        raise OSError(f"log_dir={url!r}: cannot write there ({str(error) or type(error).__name__})") from error
