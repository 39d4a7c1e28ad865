"""TensorBoard event files, one Event a record."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata

from torchprobe.records import Record
from torchprobe.writers.encode import encode
from torchprobe.writers.files import FaultLog, GrowingFile
from torchprobe.writers.places import place_of
from torchprobe.writers.tfrecord import frame

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class EventFileWriter:
    """Writes event files in `log_dir`, the first made at once so that a bad directory is reported at once.

    log_dir: a directory, or the URL of one that fsspec can write to (`s3://bucket/run`). A remote file is sent whole
    with every batch, and followed by another one at 4 MiB.

    An existing file is never appended to: this one's name sorts after all others, whatever the
    clock says, and a file that is deleted, moved away, replaced or cut short by others is followed by a new one,
    with a line in the log. Every file starts
    its session at the step of its first record, or at `restart_step` (the first step that a
    resumed run can write) for the first file: in TensorBoard that hides what an earlier run left
    from this step on. `restart` says the same later.

    A batch is on disk (in the page cache, not synced), or in the store, when `write` returns. One that does not
    fit leaves the file as it was and raises OSError: write the same batch again later.

    Raises TypeError for a `log_dir` that is no path, ValueError for a URL of an unknown kind, ImportError for one whose
    package is missing, OSError for a directory that cannot be made or written to.
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], *, filename_suffix: str = "", restart_step: int | None = None
    ) -> None:
        self._place = place_of(log_dir)
        self._suffix = filename_suffix
        self._start_step = restart_step
        self._restart: int | None = None
        self._started = False
        self._described: set[str] = set()
        self._files = 0
        self._faults = FaultLog()
        self._file = self._create()

    @property
    def path(self) -> Path | str:
        """The file that is being written."""
        return self._file.path

    def write(self, records: Sequence[Record]) -> None:
        """Append a batch, in step order. Raises OSError when it does not fit; then nothing is changed."""
        if not records:
            return
        fault = self._file.fault()
        if fault is not None or self._file.full or (self._restart is not None and self._started):
            self._reopen(fault)
        if self._restart is not None:
            self._start_step, self._restart = self._restart, None
        described = self._described.copy()
        events = [] if self._started else [self._session_start(records[0])]
        for record in records:
            events.append(encode(record, described))
            described.update(record.values)
        self._file.append(b"".join(frame(event.SerializeToString()) for event in events))
        self._started, self._described = True, described
        self._start_step = records[-1].step + 1

    def restart(self, step: int) -> None:
        """What is written from now on belongs to a run that was resumed, and begins at this step."""
        self._restart = step

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        self._file.close()

    def _session_start(self, first: Record) -> Event:
        # The record's time, not the clock's: a retried batch must have the bytes of the first
        # try, part of which a loader that follows the file may have read.
        step = first.step if self._start_step is None else self._start_step
        return Event(wall_time=first.wall_time, step=step, session_log=SessionLog(status=SessionLog.START))

    def _reopen(self, fault: str | None) -> None:
        before, self._file = self._file, self._create()
        before.close()
        if fault is not None:
            self._faults.tell(before.path, fault, self._file.path)
        self._started, self._described = False, set()

    def _create(self) -> GrowingFile:
        newest = max((int(match[1]) for match in map(_NAME.match, self._place.names()) if match), default=0)
        seconds = max(int(time.time()), newest + 1)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{self._files}{self._suffix}"
        file = self._place.begin(name, frame(_version().SerializeToString()))
        self._files += 1
        return file


def _version() -> Event:
    source = SourceMetadata(writer="torchprobe")
    return Event(wall_time=time.time(), file_version="brain.Event:2", source_metadata=source)
