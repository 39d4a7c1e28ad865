"""The one background thread: waits for copies, makes records, hands batches to the writer."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import time

from torchprobe.buffer.backlog import Backlog, Faults, Repeats, Stage
from torchprobe.buffer.step import StepInFlight
from torchprobe.messages import log as _log
from torchprobe.records import Record, Text, Value
from torchprobe.writers.protocol import Writer

MAX_WAITING = 10_000  # steps between the training thread and this one
STOPPED_TAG = "torchprobe/stopped"
_AT_EXIT = 5.0  # seconds; of a thread inside torch the interpreter's end would abort the process


class Exchange:
    """Steps between arriving on the host and their record: a subclass has them wait for other ranks, or go to one."""

    patience: float | None = None
    """The longest that a caller of `flush` or `close` is kept waiting; None: as long as he likes."""

    @property
    def dropped(self) -> int:
        """What was lost on the way, in steps."""
        return 0

    def summary(self) -> str:
        """How it went with the other ranks, in a few words; empty when there are none."""
        return ""

    def pause(self) -> float | None:
        """Seconds until `release` is worth another call; None while nothing is under way."""
        return None

    def release(self, urgent: bool) -> Iterable[Record]:
        """The records that are complete. urgent: all of them, after a wait that is bounded."""
        return ()

    def close(self) -> None:
        """Say goodbye to the other ranks."""


class Drain:
    """Takes steps off the training thread's hands; never makes it wait, never lets it fail.

    decode: turns a step into a record (None to leave it out). stage: sees each record before it is written.
    flush_seconds: the longest that a step stays unwritten while the disk is well. What cannot be kept is dropped and
    counted. An exception of any kind, SystemExit too, costs the one record or attempt that raised it, is logged once
    for each kind, and stands in `faults`.
    exchange: other ranks, when there are any; then `decode` keeps steps back, and `exchange` releases them.
    """

    def __init__(
        self,
        writer: Writer,
        decode: Callable[[StepInFlight], Record | None],
        flush_seconds: float,
        stage: Stage | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._decode = decode
        self._stage = stage
        self._exchange = exchange or Exchange()
        self._flush_seconds = flush_seconds
        self._steps: deque[StepInFlight] = deque()
        self._faults = Faults()
        self._repeats = Repeats()
        self._backlog = Backlog(writer, self._faults)
        # Counted by the training thread alone, so that no lock is needed: steps put, without room, and in part lost;
        # losses of the process that this one goes on for; losses that a flush has told of, and the steps put by then.
        self._put = self._turned_away = self._incomplete = self._earlier = 0
        self._told, self._told_at, self._latest = 0, -1, 0
        self._stopped: str | None = None
        self._unread = 0  # counted by the drain thread
        # Guards what follows, and is never held while copying, decoding or writing.
        self._wake = threading.Condition()
        self._asked = self._served = self._written = 0  # numbers of flush requests
        self._urgent = self._closing = self._ended = self._clean = False
        self._thread = threading.Thread(target=self._run, name="torchprobe-drain", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Steps and records lost so far, in whole or in part; those of an earlier process too."""
        return self._earlier + self._lost

    @property
    def faults(self) -> list[str]:
        """What went wrong so far, a short line each, for a person; empty when nothing did."""
        lines = [] if self._stopped is None else [f"recording stopped: {self._stopped}"]
        lines += [f"steps dropped, the queue was full: {self._turned_away}"] if self._turned_away else []
        lines += [f"steps without room for their statistics: {self._incomplete}"] if self._incomplete else []
        return lines + self._faults.lines

    @property
    def ranks(self) -> list[str]:
        """A line on the other ranks for a person, when there are any."""
        words = self._exchange.summary()
        return [f"  ranks             {words}"] if words else []

    def admit(self) -> bool:
        """Whether there is room for one more step; when there is none, counts it as dropped. Never blocks."""
        full = len(self._steps) >= MAX_WAITING
        if full or self._ended:
            self._turned_away += 1
            if self._turned_away == 1 and full:
                _log.warning(
                    "%d steps wait to be written, and no more are kept: writing is slower than training, and steps are "
                    "dropped until it has caught up; raise every=, or write to a faster disk",
                    MAX_WAITING,
                )
            return False
        return True

    def count_dropped(self, number: int) -> None:
        """Losses of the process that this one goes on for."""
        self._earlier = number

    def put(self, step: StepInFlight) -> None:
        """Queue an admitted step for the next flush. Never blocks."""
        self._put += 1
        self._latest = step.step
        self._incomplete += step.lost
        self._steps.append(step)

    def put_values(self, step: int, values: dict[str, Value]) -> None:
        """Queue a step of host values alone, if there is room. Never blocks."""
        if (len(self._steps) < MAX_WAITING and not self._ended) or self.admit():
            self._put += 1
            self._latest = step
            self._steps.append(StepInFlight(step, time(), values))

    def stopped(self, reason: str) -> None:
        """Recording has stopped: from now on `flush` and `close` are False, and a text says so in the run.
        Never blocks; the first call counts."""
        if self._stopped is None:
            self._stopped = reason
            text = Text(f"torchprobe stopped recording after this step: {reason}")
            self._steps.append(StepInFlight(self._latest, time(), {STOPPED_TAG: text}))
            self.wake()

    def wake(self, urgent: bool = False) -> int:
        """Ask for a flush without waiting; the number says which request it was.

        urgent: try to write now, even while waiting to retry a writer that failed.
        """
        with self._wake:
            self._asked += 1
            self._urgent |= urgent
            self._wake.notify_all()
            return self._asked

    def flush(self, timeout: float | None = None) -> bool:
        """Write what was put before; True when it is written, and nothing was lost since the last flush.

        Asked again with no step in between, it answers the same. Waits up to `timeout` seconds, or as long as it
        takes. False when time runs out, the writer fails, recording has stopped or the drain is closed; at once in the
        drain thread itself, which a garbage collection can run.
        """
        asked = self.wake(urgent=True)
        with self._wake:
            if self._thread is not threading.current_thread():
                self._wake.wait_for(lambda: self._served >= asked or self._ended, self._longest(timeout))
            written = self._written >= asked
        told = self._tell()
        return written and not told

    def close(self, timeout: float | None = None) -> bool:
        """Write what was put before, stop the thread and close the writer. A second call waits for the rest of it.

        Waits up to `timeout` seconds, or as long as it takes; the program's end a little more. False when something was
        left unwritten, or lost at any time.
        """
        self._closing = True
        self.wake(urgent=True)
        if self._thread is threading.current_thread():
            return False
        atexit.register(self._thread.join, _AT_EXIT)
        self._thread.join(self._longest(timeout))
        if self._ended:
            atexit.unregister(self._thread.join)
        return self._clean and not self._lost and self._stopped is None

    @property
    def _lost(self) -> int:
        return self._turned_away + self._incomplete + self._unread + self._backlog.dropped + self._exchange.dropped

    def _tell(self) -> bool:
        """Whether a flush has losses to tell of: new ones, or those of the last flush while no step has come since."""
        lost = self._lost
        if lost > self._told:
            self._told, self._told_at = lost, self._put
        return self._stopped is not None or self._put == self._told_at

    def _run(self) -> None:
        try:
            while not self._cycle():
                pass
        finally:
            self._unread += len(self._steps)
            self._attempt("taking leave of the other ranks", self._exchange.close)
            if self._stage is not None:
                self._attempt("closing the alerts", self._stage.close)
            if self._turned_away:
                _log.error("%d steps were dropped: they came faster than they could be written", self._turned_away)
            closed = self._backlog.close()
            with self._wake:
                self._clean = closed and self._written == self._served
                self._ended = True
                self._wake.notify_all()

    def _cycle(self) -> bool:
        """Serve the requests made so far. True when the drain is closing and this was the last time."""
        asked, urgent, closing = self._wait()
        dropped = self._unread + self._backlog.dropped
        self._collect()
        self._release(urgent or closing)
        written = self._backlog.write(urgent) and dropped == self._unread + self._backlog.dropped
        with self._wake:
            self._served = asked
            if written:
                self._written = asked
            self._wake.notify_all()
        return closing

    def _wait(self) -> tuple[int, bool, bool]:
        pauses = self._backlog.pause(), self._attempt("asking for the other ranks", self._exchange.pause)
        seconds = min([self._flush_seconds, *(pause for pause in pauses if pause is not None)])
        with self._wake:
            self._wake.wait_for(lambda: self._asked > self._served or self._closing, _waitable(seconds))
            urgent, self._urgent = self._urgent, False
            return self._asked, urgent, self._closing

    def _collect(self) -> None:
        for _ in range(len(self._steps)):  # not those that arrive meanwhile: a fast loop would never be written
            self._read(self._steps.popleft())
        if self._stage is not None:
            self._write(self._staged(self._stage.at_rest, None))

    def _read(self, step: StepInFlight) -> None:
        try:
            self._pass_on(self._decode(step))
        except BaseException as error:
            self._unread += 1
            message = "step %d could not be read back and is dropped; training goes on"
            self._faults.add("steps that could not be read", error, message, step.step)

    def _release(self, urgent: bool) -> None:
        try:
            for record in self._exchange.release(urgent):
                self._pass_on(record)
        except BaseException as error:
            self._unread += 1
            message = "combining values of several ranks failed; training goes on"
            self._faults.add("steps that could not be combined", error, message)

    def _pass_on(self, record: Record | None) -> None:
        new = None if record is None else self._repeats.without(record)
        if new is not None:
            stage = self._stage
            self._write(new if stage is None else self._staged(lambda: stage(new), new))

    def _write(self, record: Record | None) -> None:
        new = None if record is None else self._repeats.without(record)
        if new is not None:
            self._repeats.note(new)
            self._backlog.add(new)

    def _staged(self, ask: Callable[[], Record | None], otherwise: Record | None) -> Record | None:
        try:
            return ask()
        except BaseException as error:
            self._stage = None
            message = "alerts failed and are switched off; recording and training go on"
            self._faults.add("alerts are switched off", error, message)
            return otherwise

    def _attempt(self, what: str, call: Callable[[], float | None]) -> float | None:
        try:
            return call()
        except BaseException as error:
            self._faults.add(f"{what} failed", error, f"{what} failed; recording and training go on")
            return None

    def _longest(self, timeout: float | None) -> float | None:
        """What a caller waits at most, in a form that the system knows."""
        limits = [seconds for seconds in (timeout, self._exchange.patience) if seconds is not None]
        return _waitable(min(limits, default=None))


def _waitable(timeout: float | None) -> float | None:
    """The longest wait that the system knows, for `math.inf` and its like."""
    return None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
