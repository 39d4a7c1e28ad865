"""Which directory and which writer a run gets: the user's own writer, or event files in a directory of its own.

That is the directory that was asked for, unless another run is there: settled at the first write.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from torchprobe.messages import log as _log
from torchprobe.records import Record
from torchprobe.writers.files import LONGEST, NO_NAME, FileStore, bytes_of, check_path, located, place_of
from torchprobe.writers.layout import LayoutWriter
from torchprobe.writers.protocol import Writer

if TYPE_CHECKING:
    from torchprobe.writers.event_file import EventFileWriter

LOCK = ".torchprobe.lock"
_LOCK_SECONDS = 60.0  # it is held for milliseconds: an older one is that of a killed process
_EVENTS = "tfevents"  # what TensorBoard takes for an event file has it in its name
_NO_FOLDER = re.compile(rf"[/\\]|{NO_NAME.pattern}")
_NUMBERED = re.compile(r"run_(\d{1,9})")
_OWNED = re.compile(r"events\.out\.tfevents\.\d{10}\..*\.run-([0-9a-f]{12})")


def open_writer(
    writer: Any,
    log_dir: str | os.PathLike[str] | None,
    run_name: str | None,
    model_name: str,
    *,
    overwrite: bool = False,
) -> tuple[RunDirectory | None, Writer]:
    """The run's directory (None for a writer of the user's) and the writer.

    Raises TypeError or ValueError for what is no writer or no directory, OSError where it cannot be written.
    """
    if not isinstance(overwrite, bool):
        raise TypeError(f"overwrite={overwrite!r}: takes True or False, not {type(overwrite).__name__}")
    if writer is None:
        run = RunDirectory(run_directory(log_dir, run_name, model_name), overwrite=overwrite)
        return run, LayoutWriter(run)
    if log_dir is not None or run_name is not None or overwrite:
        raise ValueError("writer and log_dir (run_name, overwrite) exclude each other: a writer knows where it writes")
    if hasattr(writer, "add_scalar"):
        from torchprobe.writers.summary_writer import SummaryWriterAdapter

        return None, SummaryWriterAdapter(writer)
    if isinstance(writer, Writer) and not isinstance(writer, type):
        return None, writer
    raise TypeError(f"writer={writer!r}: takes a SummaryWriter, or an object with write(records) and close()")


def run_directory(log_dir: str | os.PathLike[str] | None, run_name: str | None, model_name: str) -> Path | str:
    """`log_dir` itself, or its sub-folder `run_name`; without a `log_dir`, one under `runs`. A str for a URL.

    Without either, the folder is new and made at once, so that no other run takes the same name. Raises TypeError or
    ValueError for a run name that is no single folder name, and for a `log_dir` that is empty or a file.
    """
    if log_dir is not None and not isinstance(log_dir, str | os.PathLike):
        raise TypeError(f"log_dir={log_dir!r}: takes a path, such as 'runs/exp1', not {type(log_dir).__name__}")
    if log_dir == "":
        raise ValueError("log_dir='' is empty: takes a path, such as 'runs/exp1'; leave it out for a new folder")
    if run_name is not None:
        check_run_name(run_name)
    parent = located("runs" if log_dir is None else log_dir)
    path = _join(parent, run_name) if run_name else parent
    if isinstance(path, Path):
        check_path("log_dir", path)
        nearest = next((part for part in (path, *path.parents) if part.exists()), path)
        if nearest.exists() and not nearest.is_dir():
            raise ValueError(f"log_dir: {nearest} is a file, and a run needs a directory; choose another path")
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{model_name}"
    return new_folder(Path("runs"), name) if log_dir is None and run_name is None else path


def check_run_name(run_name: str, argument: str = "run_name") -> None:
    """Raise for a name that would leave the log directory or nest inside it."""
    if not isinstance(run_name, str):
        raise TypeError(f"{argument}={run_name!r}: takes a string, not {type(run_name).__name__}")
    if not run_name.strip() or run_name == "." or ".." in run_name or _NO_FOLDER.search(run_name):
        takes = "takes one folder name, without '..' or a path separator; put the folders above it into log_dir"
        raise ValueError(f"{argument}={run_name!r}: {takes}")
    if (size := bytes_of(run_name)) > LONGEST:
        raise ValueError(f"{argument}={run_name!r}: has {size} bytes, a folder's name at most {LONGEST}: shorten it")


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
        from torchprobe.writers.event_file import EventFileWriter  # imports tensorboard: only when needed

        place_of(log_dir).check()
        self._make = EventFileWriter
        self._relative = isinstance(log_dir, Path) and not log_dir.is_absolute()
        self._asked = log_dir.absolute() if isinstance(log_dir, Path) else log_dir  # wherever the program goes
        self._overwrite = overwrite
        self._run = uuid4().hex[:12]
        self._loaded = False
        self._step: int | None = None  # the first one of a run that goes on
        self._restarted = False
        self._settling = threading.Lock()  # a flight recording may come first, at the end from a thread of its own
        self._path = self._asked
        self._made: Path | str | None = None  # one below `log_dir`, for another attempt after a failed one
        self._file: EventFileWriter | None = None
        self._closed = False

    @property
    def path(self) -> Path | str:
        """Where the run is: what was asked for until the first write."""
        with suppress(OSError, ValueError):  # the program has gone to another directory
            if self._relative and isinstance(self._path, Path):
                return self._path.relative_to(Path.cwd())
        return self._path

    def state_dict(self) -> dict[str, Any]:
        """The run's identity."""
        return {"run": self._run}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """This run is the one of this state; `restart` follows."""
        if not re.fullmatch(r"[0-9a-f]{12}", state["run"]):  # it becomes a part of file names
            raise ValueError(f"run={state['run']!r}")
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
        file = self._make(directory, filename_suffix=f".run-{self._run}", restart_step=step)
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


def new_folder(parent: Path, name: str) -> Path:
    """Made at once, with a number where another run has the name. Raises OSError."""
    number, path = 1, parent / name
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # of another run of this second
            if not path.exists():  # or a link to nowhere, further up
                raise
        number += 1
        path = parent / f"{name}-{number}"


@dataclass(frozen=True, slots=True)
class _Folder:
    run: RunDirectory
    name: str

    def put(self, name: str, data: bytes) -> str:
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
    is_mine = lock is None or _made(lock)
    try:
        yield is_mine
    finally:
        if is_mine and lock is not None:
            lock.unlink(missing_ok=True)


def _made(lock: Path) -> bool:
    """Whether this call made the file: of several processes only one does. That of a killed process goes first."""
    with suppress(FileNotFoundError):
        if time() - lock.stat().st_mtime >= _LOCK_SECONDS:
            lock.unlink()
    try:
        lock.open("xb").close()
    except FileExistsError:
        return False
    return True
