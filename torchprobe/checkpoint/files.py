"""A directory of checkpoints. Its names alone say which there are, so that no kill leaves it in two minds."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

SHARDED = ".sharded"  # a directory of torch.distributed.checkpoint
WHOLE = ".pt"

_NAME = re.compile(r"step_(\d{10,})(?:\.restart(\d+))?(\.best)?(\.pt|\.sharded)")
_RANK = re.compile(r"step_(\d{10,})\.rank\d+\.pt")
_TEMPORARY = re.compile(r"\.step_.*\.(?P<host>[^.]*)\.(?P<pid>\d+)\.tmp")


@dataclass(frozen=True, slots=True, order=True)
class Stored:
    """A complete checkpoint; in the order in which they were written."""

    restart: int
    """How often the run had gone back to an earlier step by then."""
    step: int
    best: bool
    """Whether it was the best so far when it was written."""
    path: Path


def next_name(directory: Path, step: int, best: bool, suffix: str) -> str:
    """A checkpoint's file name, or its directory's; it sorts behind those that are there, also after a step back."""
    last = stored(directory)[-1:]
    restart = sum(one.restart + (step < one.step) for one in last)
    return f"step_{step:010d}{f'.restart{restart}' if restart else ''}{'.best' if best else ''}{suffix}"


def stored(directory: Path) -> list[Stored]:
    """All complete checkpoints, oldest first."""
    paths = directory.iterdir() if directory.is_dir() else ()
    matches = ((path, _NAME.fullmatch(path.name)) for path in paths)
    return sorted(Stored(int(m[2] or 0), int(m[1]), m[3] is not None, path) for path, m in matches if m)


def prune(directory: Path, max_keep: int) -> None:
    """Delete all but the newest `max_keep` and the newest that was best, and what belongs to no checkpoint."""
    found = stored(directory)
    kept = found[-max_keep:] + [one for one in found if one.best][-1:]
    for one in found:
        if one not in kept:
            remove(one.path)
    steps = {one.step for one in kept}
    for path in directory.iterdir():
        match = _RANK.fullmatch(path.name)
        if (match and int(match[1]) not in steps) or _abandoned(path):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or a directory; one that another process deletes meanwhile is no error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """A hidden name beside `path` for what is not complete yet; it says whose it is."""
    host = socket.gethostname().replace(".", "-")
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")


def write_file(path: Path, payload: Any) -> None:
    """`torch.save` that is there as a whole or not at all, whenever the process is killed.

    Raises OSError when it does not fit, and what `torch.save` raises; then nothing is left of it.
    """
    unfinished = temporary(path)
    try:
        with unfinished.open("wb") as raw:
            file = _Noting(raw)
            try:
                torch.save(payload, cast("IO[bytes]", file))
            except RuntimeError as error:  # torch's, for a write that failed below it
                raise (file.failure or error) from error
            raw.flush()
            os.fsync(raw.fileno())
        publish(unfinished, path)
    except BaseException:
        remove(unfinished)
        raise


def publish(unfinished: Path, path: Path) -> None:
    """Give a complete file or directory its name, on disk too."""
    if path.is_dir():
        remove(path)
    unfinished.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make names in a directory survive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_file(path: Path, map_location: Any) -> Any:
    """`torch.load(weights_only=True)` after a look at the file's checksums, which torch does not compare.

    Raises what either raises for a file that is damaged.
    """
    if torch.serialization.get_crc32_options():
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
    return torch.load(path, map_location=map_location, weights_only=True)


class _Noting:
    """A file that remembers why a write failed: torch reports it as a RuntimeError of its own."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.failure: OSError | None = None
        self._raw = raw

    def write(self, data: Any) -> int:
        if self.failure is not None:
            return len(data)  # torch writes on while it gives up
        try:
            return self._raw.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._raw.flush()


def _abandoned(path: Path) -> bool:
    """Whether it is a temporary file of a process of this machine that is gone."""
    match = _TEMPORARY.fullmatch(path.name)
    if os.name != "posix" or match is None or match["host"] != socket.gethostname().replace(".", "-"):
        return False
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
