"""The webhook: what it posts, and that nothing waits for it."""

from __future__ import annotations

import http.server
import json
import math
import threading
from contextlib import contextmanager
from time import monotonic

import pytest

import torchprobe
from torchprobe.rules import webhook

ALERT = torchprobe.Alert("loss_spike", 7, None, math.inf, 6.0, "the loss")


@contextmanager
def receiver(*answers: int):
    """A server that gives these answers in turn, and then 200: its address, and what it got."""
    got, waiting = [], list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(waiting.pop(0) if waiting else 200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(webhook, "_FIRST_PAUSE", 0.01)


def test_an_alert_arrives_as_json_with_a_text():
    with receiver() as (url, got):
        notify = torchprobe.WebhookNotifier(url)
        notify(ALERT)
        notify.close()
    assert got == [
        {
            "text": f"torchprobe: {ALERT}", "rule": "loss_spike", "step": 7, "where": None, "value": "inf",
            "threshold": 6.0, "message": "the loss", "ended": False,
        }
    ]  # fmt: skip
    assert (notify.sent, notify.dropped) == (1, 0)


def test_a_failing_server_is_tried_again_and_a_refusing_one_is_not():
    for answers, sent, attempts in (((500, 503), 1, 3), ((404,), 0, 1), ((500,) * 9, 0, 4)):
        with receiver(*answers) as (url, got):
            notify = torchprobe.WebhookNotifier(url, retries=3)
            notify(ALERT)
            deadline = monotonic() + 60
            while notify.sent + notify.dropped == 0 and monotonic() < deadline:
                threading.Event().wait(0.005)
            notify.close()
        assert (notify.sent, notify.dropped, len(got)) == (sent, 1 - sent, attempts)


def test_a_webhook_that_is_down_costs_counted_drops_and_one_warning_without_the_secret(caplog):
    with receiver() as (url, _):
        pass  # nobody listens there any more
    notify = torchprobe.WebhookNotifier(url, timeout=0.5, retries=0)
    for _ in range(300):
        notify(ALERT)
    notify.close()
    assert (notify.sent, notify.dropped) == (0, 300)
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text


def test_nobody_waits_for_a_webhook_that_does_not_answer(monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def post(self, body):
        asked.set()
        assert answer.wait(60)
        return None, False

    monkeypatch.setattr(torchprobe.WebhookNotifier, "_post", post)
    notify = torchprobe.WebhookNotifier("http://127.0.0.1:9/secret", timeout=60)
    notify(ALERT)
    assert asked.wait(60)
    for _ in range(300):
        notify(ALERT)
    assert (notify.sent, notify.dropped) == (0, 300 - webhook.MAX_WAITING)  # and still the first is under way
    answer.set()
    notify.close()
    assert notify.sent == 1 + webhook.MAX_WAITING


def test_an_alert_that_is_no_json_is_dropped_and_said_and_the_next_one_is_sent(caplog):
    with receiver() as (url, got):
        notify = torchprobe.WebhookNotifier(url)
        notify(torchprobe.Alert("mine", 1, None, object(), None, "no number"))
        notify(ALERT)
        notify.close()
    assert (notify.sent, notify.dropped, len(got)) == (1, 1, 1)
    assert "TypeError" in caplog.text


def test_it_can_be_used_again_after_closing():
    with receiver() as (url, got):
        notify = torchprobe.WebhookNotifier(url)
        for _ in range(2):
            notify(ALERT)
            notify.close()
        notify.close()
    assert len(got) == 2


@pytest.mark.parametrize("options", [{"url": "ftp://x"}, {"url": "x"}, {"timeout": 0}, {"retries": -1}])
def test_a_wrong_argument_is_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        torchprobe.WebhookNotifier(**{"url": "http://localhost", **options})


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirection_counts_as_dropped_and_is_said(code, caplog):
    with receiver(code) as (url, got):
        notify = torchprobe.WebhookNotifier(url)
        notify(ALERT)
        notify.close()
    assert (notify.sent, notify.dropped, len(got)) == (0, 1, 1)
    assert f"answer {code}: moved" in caplog.text


SECRET = "T0PS3CR3T"


@pytest.mark.parametrize(
    "url",
    [
        f"http://127.0.0.1:9/services/{SECRET} x",
        f"http://127.0.0.1:9/services/{SECRET}\n",
        f"http://127.0.0.1:9/services/{SECRET}ü",
        f"http://bot:{SECRET}@127.0.0.1/hook",
        f"http://{SECRET}@127.0.0.1/hook",
        f"http://127.0.0.1:{SECRET}/hook",
        f"http://[{SECRET}/hook",
        f"htp://127.0.0.1/{SECRET}",
        SECRET.encode(),
    ],
)
def test_an_address_that_is_refused_is_not_shown(url):
    with pytest.raises((ValueError, TypeError), match=r"^url= takes") as refused:
        torchprobe.WebhookNotifier(url)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("url", [f"http://127.0.0.1:99999/{SECRET}", f"http://no-such-host.invalid?key={SECRET}"])
def test_what_goes_wrong_on_the_way_does_not_show_the_address(url, caplog):
    notify = torchprobe.WebhookNotifier(url, timeout=1.0, retries=0)
    notify(ALERT)
    notify.close()
    assert notify.dropped == 1
    assert "could not be sent" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "url", ["https://hooks.slack.com/services/T0/B0/x_-~", "HTTP://[::1]:80", "http://a-b.c/?k=%20#f"]
)
def test_addresses_that_are_taken(url):
    torchprobe.WebhookNotifier(url)


def test_alerts_behind_an_answer_that_never_ends_are_counted_at_the_end(caplog):
    over = threading.Event()

    class Drips(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not over.wait(0.01):  # each byte comes well within the timeout
                self.wfile.write(b"A")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drips)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        notify = torchprobe.WebhookNotifier(f"http://127.0.0.1:{server.server_port}/secret", timeout=0.2, retries=0)
        for _ in range(3):
            notify(ALERT)
        notify.close()
        assert (notify.sent, notify.dropped) == (0, 2)  # of the first nobody knows yet
        [line] = caplog.messages
        assert "the answer to an earlier one does not come to an end" in line
        assert "secret" not in line
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
