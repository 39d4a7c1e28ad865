"""Sends alerts to a URL, from a thread of its own."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import re
import threading
import urllib.error
import urllib.request
from dataclasses import asdict
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from torchprobe.arguments import check_positive
from torchprobe.messages import log as _log
from torchprobe.rules.alert import Alert

MAX_WAITING = 100  # alerts
_FIRST_PAUSE = 0.5  # seconds before the first retry; it doubles
_FOR_GOOD = range(300, 500)  # answers that another attempt would not change, but for
_FOR_NOW = (408, 425, 429)
_ADDRESS = re.compile(r"https?://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(:\d+)?([/?#][!-~]*)?", re.IGNORECASE)


class WebhookNotifier:
    """Posts each alert as JSON to `url`: for `on_alert=`. The `text` is what Slack and its like show.

    Neither training nor the drain thread ever waits for it: alerts wait in a queue of 100, and what does not fit, or
    is not taken after `retries` further attempts with growing pauses, is counted in `dropped`. timeout: seconds for an
    attempt; `close` waits for up to twice that.

    Raises ValueError or TypeError for what is no http(s) URL or no number.
    """

    def __init__(self, url: str, timeout: float = 5.0, retries: int = 3) -> None:
        self._url = _checked_url(url)
        check_positive("timeout", timeout)
        self._timeout = timeout
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries={retries!r}: takes a whole number of attempts after the first, 0 or more")
        self._retries = retries
        self._opener = urllib.request.build_opener(_NotMoved)
        self.sent = 0
        """Alerts that the receiver has taken."""
        self.dropped = 0
        """Alerts that it never got."""
        self._lock = threading.Lock()
        self._warned = False
        self._thread: threading.Thread | None = None
        self._start_anew()

    def __call__(self, alert: Alert) -> None:
        """Queue an alert. Never blocks."""
        with self._lock:
            if self._thread is None:
                self._start_anew()
                self._thread = threading.Thread(
                    target=self._run, args=(self._queue, self._closing), name="torchprobe-webhook", daemon=True
                )
                self._thread.start()
            try:
                self._queue.put_nowait(alert)
            except queue.Full:
                self._drop(f"{MAX_WAITING} alerts are waiting")

    def close(self) -> None:
        """Send what waits, for up to `timeout` seconds and without further retries; a later alert starts anew."""
        with self._lock:
            thread, self._thread, waiting = self._thread, None, self._queue
        if thread is not None:
            self._deadline = monotonic() + self._timeout
            self._closing.set()
            with contextlib.suppress(queue.Full):  # then it is awake
                waiting.put_nowait(None)
            thread.join(2 * self._timeout)  # an attempt that is under way may take all of it
            with contextlib.suppress(queue.Empty):
                while thread.is_alive():
                    if waiting.get_nowait() is not None:
                        self._drop("the answer to an earlier one does not come to an end")

    def _start_anew(self) -> None:
        self._queue: queue.Queue[Alert | None] = queue.Queue(MAX_WAITING)
        self._closing = threading.Event()
        self._deadline = math.inf

    def _run(self, waiting: queue.Queue[Alert | None], closing: threading.Event) -> None:
        while not (closing.is_set() and waiting.empty()):
            alert = waiting.get()
            if alert is None:
                continue  # woken up to end
            if monotonic() < self._deadline:
                try:
                    self._deliver(alert, closing)
                except Exception as error:  # of an alert that was made by hand
                    self._drop(f"{type(error).__name__}: {error}")
            else:
                self._drop("the run is over")

    def _deliver(self, alert: Alert, closing: threading.Event) -> None:
        body = json.dumps(payload(alert)).encode()
        for attempt in range(self._retries + 1):
            reason, again = self._post(body)
            if reason is None:
                self.sent += 1
                return
            if not again or closing.is_set() or attempt == self._retries:
                break
            closing.wait(_FIRST_PAUSE * 2**attempt)
        self._drop(reason or "")

    def _post(self, body: bytes) -> tuple[str | None, bool]:
        """What went wrong, or None; and whether another attempt may help."""
        request = urllib.request.Request(
            self._url, body, {"Content-Type": "application/json", "User-Agent": "torchprobe"}
        )
        try:
            with self._opener.open(request, timeout=self._timeout):
                return None, False
        except urllib.error.HTTPError as error:
            with error:
                moved = ": moved, and alerts are sent to no other address" if error.code < 400 else ""
                return f"answer {error.code}{moved}", error.code in _FOR_NOW or error.code not in _FOR_GOOD
        except Exception as error:  # whose words may hold the address
            reason = getattr(error, "reason", None)
            return str(reason) if isinstance(reason, OSError) else type(error).__name__, True

    def _drop(self, reason: str) -> None:
        self.dropped += 1
        if not self._warned:
            self._warned = True
            host = urlsplit(self._url).hostname  # without the path, which is a secret with most webhooks
            _log.warning("an alert could not be sent to %s (%s); dropped ones are counted", host, reason)


def payload(alert: Alert) -> dict[str, Any]:
    """What is posted: `text` for people, and the alert's fields; numbers that JSON lacks are strings."""
    text = f"torchprobe: {alert}" + (f"\n{alert.advice}" if alert.advice else "")
    found = {**asdict(alert), "members": list(alert.members)}
    odd = {name: str(found[name]) for name in ("value", "threshold") if not math.isfinite(found[name] or 0.0)}
    kept = {name: one for name, one in found.items() if one or name not in ("members", "advice")}
    return {"text": text, **kept, **odd}


class _NotMoved(urllib.request.HTTPRedirectHandler):
    """Makes a redirection the error that it is: urllib would follow it without the alert, and call that a success."""

    def redirect_request(self, *arguments: Any) -> None:
        """To nowhere."""


def _checked_url(url: Any) -> str:
    """As given. An error does not show it: most of it is a secret."""
    if not isinstance(url, str):
        raise TypeError(f"url= takes a string, not {type(url).__name__}")
    if not _ADDRESS.fullmatch(url):
        raise ValueError("url= takes an http:// or https:// address: no spaces, no user name, a number as port")
    return url
