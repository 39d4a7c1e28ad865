"""Whole files on their way to a place that may be out of reach for a while."""

from __future__ import annotations

import logging
import threading
from time import monotonic

from torchprobe.writers.places import Place

MAX_WAITING = 5  # files: the first ones, which are nearest to a cause
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0  # seconds between attempts while the place is out of reach

_log = logging.getLogger("torchprobe")


class Outbox:
    """Puts whole files into a place, each as soon as it can. Used by one thread.

    One that cannot be written waits, and is tried again with growing pauses; beyond MAX_WAITING the new one is
    dropped. The first failure is logged. what: how the log calls such a file.
    """

    def __init__(self, place: Place, what: str) -> None:
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
