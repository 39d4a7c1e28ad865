"""An S3 store on this machine that can go down and come back: moto's server."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

# Below the ports that outgoing connections get: while the store is down, nothing else takes its port, not even a client
# that tries to reach it and, on Linux, can be connected to itself.
_PORTS = range(20_000, 32_000)
_SECONDS = 120.0  # for the server to start: it imports much, and the machine may be busy

# Straight to the loopback address, whatever proxy the environment names.
_fetch = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Store:
    """What it holds is gone when it goes down."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Start on the port of the last time; the first time on one that is free."""
        ports = itertools.repeat(self.port) if self.port else _free_ports()
        deadline = time.monotonic() + _SECONDS
        for self.port in ports:
            command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while self.process.poll() is None:  # one that ends found its port taken
                if self._has_bucket() and self.process.poll() is None:  # else it is another one that answers
                    return
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.1)
            assert time.monotonic() < deadline, "moto's server does not start"

    def down(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _has_bucket(self) -> bool:
        try:
            request = urllib.request.Request(f"{self.url}/bucket", method="PUT")
            _fetch(request, timeout=5).close()
        except OSError:
            return False
        return True


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with `s3://bucket`, s3fs without patience, and an environment in which children find the store too."""
    pytest.importorskip("moto", reason="needs moto")
    pytest.importorskip("flask", reason="needs flask for moto's server")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    store = Store()
    store.up()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": store.url,
        "AWS_MAX_ATTEMPTS": "1",
        "S3_ENDPOINT": store.url,
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield store
    store.down()
    _close_sessions(s3fs.S3FileSystem)


def _free_ports() -> Iterator[int]:
    """Ports that nobody listens on right now, in an order that other processes do not have."""
    numbers = random.Random(f"{os.getpid()} {time.time()}")
    for port in numbers.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            probe.close()
            yield port


def _close_sessions(kind: type) -> None:
    """s3fs gives a session a tenth of a second to close; on a busy machine it is left open, which is a warning."""
    from fsspec.asyn import sync

    for filesystem in list(kind._cache.values()):  # type: ignore[attr-defined]
        creator = getattr(filesystem, "_s3creator", None)
        if creator is not None:
            sync(filesystem.loop, creator.__aexit__, None, None, None, timeout=60)
    kind.clear_instance_cache()  # type: ignore[attr-defined]
