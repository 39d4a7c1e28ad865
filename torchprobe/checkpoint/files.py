"""A directory of checkpoints. Its names alone say which there are, so that no kill leaves it in two minds.

Files are whole or not there, and hold `plain` values, which `torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SHARDED = ".sharded"  # a directory of torch.distributed.checkpoint
WHOLE = ".pt"

_NAME = re.compile(r"step_(\d{10,})(?:\.restart(\d+))?(\.best)?(\.pt|\.sharded)")
_RANK = re.compile(r"step_(\d{10,})\.rank\d+\.pt")
_TEMPORARY = re.compile(r"\.step_.*\.(?P<host>[^.]*)\.(?P<pid>\d+)\.tmp")

_ATOMS = (str, int, float, bool, complex, bytes, type(None), torch.dtype, torch.device, torch.Size)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_PICKLE = b"\x80"  # how one begins
_ATTEMPTS = 1000  # to lock a file that others rename or remove first; each costs them a whole file


class RefusedError(UnpicklingError):
    """A file that weights-only loading does not take, whole as it is."""


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
        if match and int(match[1]) not in steps:
            remove(path)
        _remove_abandoned(path)


def remove(path: Path) -> None:
    """Delete a file or a directory; one that another process deletes meanwhile is no error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """A hidden name beside `path` for what is not complete yet; it says whose it is."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")


@contextlib.contextmanager
def held(path: Path, make: Callable[[Path], object]) -> Iterator[None]:
    """Makes a temporary file or directory, which no other process's `prune` removes inside, unless this one is killed.

    What cannot be made, or not be locked (as on Windows), is left to those who write to it.
    """
    with contextlib.ExitStack() as lock:
        for _ in range(0 if fcntl is None else _ATTEMPTS):
            try:
                make(path)
                lock.enter_context(_locked(path, wait=True))
            except FileNotFoundError:  # removed between the two
                continue
            except OSError:
                pass
            break
        yield


def make_anew(directory: Path) -> None:
    """Make a directory, in place of what a killed process of this one's number left."""
    remove(directory)
    directory.mkdir()


def write_file(path: Path, payload: Any) -> None:
    """`torch.save` that is there as a whole or not at all, whenever the process is killed.

    Raises OSError when it does not fit, and what `torch.save` raises; then nothing is left of it.
    """
    unfinished = temporary(path)
    with held(unfinished, Path.touch):
        try:
            with unfinished.open("wb") as raw:
                _save(payload, raw)
            publish(unfinished, path)
        except BaseException:
            remove(unfinished)
            raise


def _save(payload: Any, raw: IO[bytes]) -> None:
    file = _Noting(raw)
    try:
        torch.save(payload, cast("IO[bytes]", file))
    except RuntimeError as error:  # torch's, for a write that failed below it
        raise (file.failure or error) from error
    raw.flush()
    os.fsync(raw.fileno())


def publish(unfinished: Path, path: Path) -> None:
    """Give a complete file or directory its name, on disk too."""
    if path.is_dir():
        remove(path)
    unfinished.replace(path)
    with contextlib.suppress(OSError):  # so that the name survives a power failure, where the system can
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_file(path: Path, map_location: Any) -> Any:
    """`torch.load(weights_only=True)` after a look at the file's checksums, which torch does not compare.

    Raises what either raises for a file that is damaged, RefusedError for one that holds more than plain values.
    """
    with path.open("rb") as file:
        if file.read(1) == _PICKLE:
            raise RefusedError("it is a bare pickle, which CheckpointManager does not write and which could run code")
    if torch.serialization.get_crc32_options():
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError:  # its message tells how to load the file all the same
        names: list[str] = []
        with contextlib.suppress(Exception):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = ", ".join(names) or "more than plain values and tensors"
        raise RefusedError(f"it holds {foreign}; loading a checkpoint runs no code") from None


def plain(value: Any, where: str) -> Any:
    """`value` made of types that weights-only loading takes; numpy's scalars and arrays become Python's and tensors.

    where: what to call the value in messages. Raises TypeError, naming the place, for anything else.
    """
    if type(value) in _ATOMS or type(value) in _TENSORS or type(value) in torch.serialization.get_safe_globals():
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return _plain_mapping(value, where)
    if isinstance(value, tuple | list | set | frozenset):
        kind = tuple if isinstance(value, tuple) else list if isinstance(value, list) else set
        return kind(plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise TypeError(
        f"{where} is a {type(value).__name__}, which torch.load(weights_only=True) does not read: "
        "save plain values and tensors"
    )


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


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file of a process of this machine that is gone, whoever has its number now."""
    match = _TEMPORARY.fullmatch(path.name)
    if fcntl is None or match is None or match["host"] != _host():
        return
    try:
        with _locked(path, wait=False):
            remove(path)
    except (BlockingIOError, FileNotFoundError):
        return
    except OSError:  # a file system without locks
        try:
            os.kill(int(match["pid"]), 0)
        except ProcessLookupError:
            remove(path)
        except OSError:
            return


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    """A lock that ends with the process. Raises BlockingIOError when another has it, OSError where there are none."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileNotFoundError(path)
        yield
    finally:
        os.close(descriptor)


def _plain_mapping(value: Mapping[Any, Any], where: str) -> Any:
    items = [(plain(key, f"a key of {where}"), plain(item, f"{where}[{key!r}]")) for key, item in value.items()]
    if type(value) is Counter:
        return Counter(dict(items))
    if type(value) is OrderedDict:
        copy = OrderedDict(items)
        vars(copy).update(plain(vars(value), f"attributes of {where}"))  # `_metadata`, the versions of modules
        return copy
    return dict(items)
