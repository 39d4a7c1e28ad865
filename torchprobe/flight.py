"""How a run ends, and the flight recorder: the last sampled steps, written down when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import platform
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from time import time

import numpy as np
import torch

from torchprobe._version import __version__
from torchprobe.records import Image, Record, StepSnapshot, Text
from torchprobe.rules.alert import Alert, TrainingAlert
from torchprobe.rules.watch import Follower
from torchprobe.rules.webhook import payload
from torchprobe.writers.files import FileStore, Outbox
from torchprobe.writers.json_lines import json_record

MAX_FILES = 20  # of a run; the one of an exception is written in any case
STATE_TAG = "torchprobe/state"
RUNNING = {STATE_TAG: Text("running")}  # goes with the first record
_LONGEST = 300  # characters of an exception
_LAST_SECONDS = 10.0  # for what could not be written before the end, such as that of an exception


class FlightRecorder(Follower):
    """Keeps the last `size` sampled records; at an alert, or when the loop raised, writes `<step>.json` into `place`.

    The file holds `step`, `reason`, `alerts`, `exception`, `versions`, `steps` (random state at the beginning of each
    sampled step, shapes of its batch: see `random_state.set_random_state`) and `records` (as in JSON lines, without
    pictures). All of it happens in the drain thread; a file that cannot be written is tried again, and at the end given
    up after 10 s. notes: what is known of the steps.
    """

    def __init__(self, place: FileStore, notes: Callable[[], Sequence[StepSnapshot]], size: int = 20) -> None:
        self._files = Outbox(place, "flight recording")
        self._notes = notes
        self._records: deque[Record] = deque(maxlen=size)
        self._latest: Record | None = None
        self._alerts: dict[int, list[Alert]] = {}
        self._exception: list[str] = []

    def follow(self, record: Record, alerts: Sequence[Alert]) -> None:
        """After the rules, before the writer."""
        self._latest = record
        if record.sampled:
            self._records.append(record)
        begun = [alert for alert in alerts if not alert.ended]
        if begun and (len(self._alerts) < MAX_FILES or record.step in self._alerts):
            those = self._alerts.setdefault(record.step, [])
            those += begun
            self._write(record.step, "alert", those)
        else:
            self._files.retry()

    def at_rest(self) -> None:
        """Nothing has happened for a while."""
        self._files.retry()

    def crashed(self, error: BaseException) -> None:
        """The training loop raised: `close` will write it down. Called in the training thread."""
        if isinstance(error, Exception) and not isinstance(error, TrainingAlert):
            self._exception = traceback.format_exception(error)

    def close(self) -> None:
        """The run has ended."""
        if self._exception:
            step = self._latest.step if self._latest is not None else 0
            self._write(step, "exception", self._alerts.get(step, []))
        self._files.close(_LAST_SECONDS)

    def _write(self, step: int, reason: str, alerts: Sequence[Alert]) -> None:
        latest = [] if self._latest is None or self._latest.sampled else [self._latest]
        content = {
            "step": step,
            "reason": reason,
            "wall_time": time(),
            "alerts": [payload(alert) for alert in alerts],
            "exception": "".join(self._exception) or None,
            "versions": versions(),
            "steps": [dataclasses.asdict(note) for note in self._notes()],
            "records": [json_record(record, without=(Image,)) for record in [*self._records, *latest]],
        }
        self._files.put(f"{step}.json", json.dumps(content, allow_nan=False).encode())


def last_error() -> BaseException | None:
    """What ends the program: an exception that nothing has caught, known at the interpreter's exit.

    Of an interactive session, and of programs that run others in their own process, it may be one that is long over.
    """
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if hasattr(sys, "ps1") or not isinstance(error, BaseException):
        return None
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    names = ((frame.f_code.co_name, frame.f_globals.get("__name__")) for frame in frames)
    return error if ("<module>", "__main__") in names else None


def state_after(error: BaseException | None) -> Text:
    """`finished`, `interrupted` by Ctrl-C, or `crashed: ` and the exception in one line."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return Text("finished")
    if isinstance(error, KeyboardInterrupt):
        return Text("interrupted")
    return Text(f"crashed: {' '.join(''.join(traceback.format_exception_only(error)).split())[:_LONGEST]}")


def state_at_exit(error: BaseException | None, model: object) -> Text:
    """The same at the end of a program; `ended` where an exception that was caught may be to blame.

    That is so in a worker process, whose runner catches everything, and when a model is dropped: model is None then.
    """
    known = error is not None or (model is not None and multiprocessing.parent_process() is None)
    return state_after(error) if known else Text("ended")


def versions() -> dict[str, str | None]:
    """What a run depends on."""
    return {
        "torchprobe": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
    }
