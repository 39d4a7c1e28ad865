"""The directory of one run: the one that was asked for, unless another run is there. Settled at the first write."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any
from uuid import uuid4

from torchprobe.records import Record
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.places import FileStore, place_of

LOCK = ".torchprobe.lock"
_LOCK_SECONDS = 60.0  # it is held for milliseconds: an older one is that of a killed process
_EVENTS = "tfevents"  # what TensorBoard takes for an event file has it in its name
_NUMBERED = re.compile(r"run_(\d{1,9})")
_OWNED = re.compile(r"events\.out\.tfevents\.\d{10}\..*\.run-([0-9a-f]{12})")

_log = logging.getLogger("torchprobe")


class RunDirectory:
    """Writes a run's event files into `log_dir`, or, where others were there first, into its `run_2`, `run_3`, ...

    Any event file makes a directory taken, also one of the user's `SummaryWriter`: TensorBoard would hide its steps,
    or mix them with this run's. The names of a run's files hold its identity, which is also its state: once that is
    loaded, the run goes on where these files are. Nothing is made before the first write but `log_dir` itself.

    Of two processes that begin at once only one takes a directory; in a store, which knows no locks, the one that
    lists later sees the other.

    overwrite: go into `log_dir` whatever is there. Nothing is removed; a START record hides it.

    Made and restarted on the training thread, used by the drain thread. Raises OSError when `log_dir` cannot be
    written to, and what `place_of` raises.
    """

    def __init__(self, log_dir: Path | str, *, overwrite: bool = False) -> None:
        place_of(log_dir).check()
        self._asked = log_dir
        self._overwrite = overwrite
        self._run = uuid4().hex[:12]
        self._loaded = False
        self._step: int | None = None  # the first one of a run that goes on
        self._restarted = False
        self._settling = threading.Lock()  # a flight recording may come first, at the end from a thread of its own
        self._path = log_dir
        self._made: Path | str | None = None  # one below `log_dir`, for another attempt after a failed one
        self._file: EventFileWriter | None = None
        self._closed = False

    @property
    def path(self) -> Path | str:
        """Where the run is: what was asked for until the first write."""
        return self._path

    def state_dict(self) -> dict[str, Any]:
        """The run's identity."""
        return {"run": self._run}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """This run is the one of this state; `restart` follows."""
        self._run, self._loaded = state["run"], True

    def restart(self, step: int) -> None:
        """Go on from this step where the loaded state's run is; if that is not known, in `log_dir` itself."""
        self._step, self._restarted = step, True

    def write(self, records: Sequence[Record]) -> None:
        """See `EventFileWriter.write`. The first call settles the directory."""
        if records:
            self._opened().write(records)

    def settle(self) -> Path | str:
        """The run's directory for good. Raises OSError."""
        self._opened()
        return self._path

    def folder(self, name: str) -> FileStore:
        """A folder of whole files in the run's directory, made with the first of them, which settles the directory."""
        return _Folder(self, name)

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        self._closed = True
        if self._file is not None:
            self._file.close()

    def _opened(self) -> EventFileWriter:
        with self._settling:
            if self._closed:
                raise OSError(f"the run in {self._path} is closed")
            restarted, self._restarted = self._restarted, False
            if restarted and self._file is not None:
                self._file.close()
                self._file = None
            if self._file is None:
                self._file = self._open()
            return self._file

    def _open(self) -> EventFileWriter:
        if self._overwrite or (self._step is not None and not self._loaded):
            return self._begin(self._asked)
        found = next(self._own_directories(), None) if self._loaded else None
        return self._begin_first() or self._begin_beside() if found is None else self._begin(found)

    def _begin_first(self) -> EventFileWriter | None:
        """In `log_dir` itself; None when it is taken."""
        place = place_of(self._asked)
        if not _is_taken(place.names()):
            with _claim(self._asked) as is_mine:
                if is_mine and not _is_taken(place.names()):
                    return self._begin(self._asked)
        return None

    def _begin_beside(self) -> EventFileWriter:
        """In a directory of its own below `log_dir`."""
        if self._made is None:
            place = place_of(self._asked)
            number = max(_numbers(place.names()), default=1) + 1
            while not place.make(f"run_{number}"):
                number += 1
            self._made = _join(self._asked, f"run_{number}")
            _log.warning(
                "log_dir=%r holds event files of another run: this one is written to %s, and both are shown. Load a "
                "state before the first step (CheckpointManager.restore, session.load_state_dict) to go on with an "
                "earlier run, pass a SummaryWriter as writer= to share its files, or overwrite=True to hide them",
                str(self._asked),
                self._made,
            )
        return self._begin(self._made)

    def _begin(self, directory: Path | str) -> EventFileWriter:
        step = 0 if self._overwrite and self._step is None else self._step
        file = EventFileWriter(directory, filename_suffix=f".run-{self._run}", restart_step=step)
        self._path = directory
        return file

    def _own_directories(self) -> Iterator[Path | str]:
        """Those whose newest event file of a session is this run's."""
        names = place_of(self._asked).names()
        if _owner(names) == self._run:
            yield self._asked
        for number in sorted(_numbers(names), reverse=True):
            below = _join(self._asked, f"run_{number}")
            if _owner(place_of(below).names()) == self._run:
                yield below


@dataclass(frozen=True, slots=True)
class _Folder:
    run: RunDirectory
    name: str

    def put(self, name: str, data: bytes) -> str:
        """See `FileStore`."""
        return place_of(_join(self.run.settle(), self.name)).put(name, data)


def _is_taken(names: Iterable[str]) -> bool:
    return any(_EVENTS in name for name in names)


def _owner(names: Iterable[str]) -> str | None:
    """The run that the newest of these event files belongs to; None when no session made any."""
    matches = map(_OWNED.fullmatch, sorted(names, reverse=True))
    return next((match[1] for match in matches if match), None)


def _numbers(names: Iterable[str]) -> list[int]:
    return [int(match[1]) for match in map(_NUMBERED.fullmatch, names) if match]


def _join(directory: Path | str, name: str) -> Path | str:
    return directory / name if isinstance(directory, Path) else f"{directory}/{name}"


@contextmanager
def _claim(directory: Path | str) -> Iterator[bool]:
    """While entered with True, nobody else is. Never waits. A store, which knows no locks, always says True."""
    lock = directory / LOCK if isinstance(directory, Path) else None
    is_mine = lock is None or _made(lock) or (_is_stale(lock) and _made(lock))
    try:
        yield is_mine
    finally:
        if is_mine and lock is not None:
            lock.unlink(missing_ok=True)


def _made(lock: Path) -> bool:
    """Whether this call made the file: of several processes only one does."""
    try:
        lock.open("xb").close()
    except FileExistsError:
        return False
    return True


def _is_stale(lock: Path) -> bool:
    """Whether a killed process left it; then removes it."""
    with suppress(FileNotFoundError):
        if time() - lock.stat().st_mtime < _LOCK_SECONDS:
            return False
        lock.unlink()
    return True
