"""Where a run's files are made: a local directory, or one in a remote store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torchprobe.run_directory import as_url, is_url, local_path
from torchprobe.writers.append_file import AppendFile
from torchprobe.writers.filesystems import filesystem_of
from torchprobe.writers.remote_file import RemoteFile


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

    def in_place(self) -> bool:
        """Whether it is still there and open."""

    def close(self) -> None:
        """Release it; a second call does nothing."""


class Place(Protocol):
    """A directory of files."""

    def names(self) -> list[str]:
        """The files there are; makes the directory when it is missing. Raises OSError."""

    def begin(self, name: str, head: bytes) -> GrowingFile:
        """A new file that starts with `head`. Raises OSError, with no file left."""

    def put(self, name: str, data: bytes) -> str:
        """A whole file, in place of an older one of this name; its path. Raises OSError; no reader sees half of it."""


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

    def names(self) -> list[str]:
        """See `Place`."""
        with _explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            return [path.name for path in self._directory.iterdir()]

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

    def names(self) -> list[str]:
        """See `Place`. A store makes a directory with its first object."""
        try:
            paths = self._filesystem.ls(self._url, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise _unreachable(error, self._url) from error
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

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
