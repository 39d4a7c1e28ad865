from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from torchprobe.cli import main, view

# Straight to the loopback address, whatever proxy the environment names.
fetch = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with one run in it, written by PyTorch itself."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "runs" / "first")) as writer:
        writer.add_scalar("train/loss", 0.5, 1)
    return tmp_path / "runs"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as soon as the address is printed, with no server behind it."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(view, "_serve", lambda directory, host, port: f"http://{host}:{port or 6006}/")
    monkeypatch.setattr(view.time, "sleep", interrupt)


def test_it_serves_the_runs_until_ctrl_c_and_leaves_no_process(runs: Path):
    command = [sys.executable, "-m", "torchprobe", "view", str(runs), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(f"TensorBoard shows {runs} at http://127.0.0.1:"), process.communicate()
            address = line.split()[-1]
            assert b"<title>TensorBoard" in fetch(address, timeout=60).read()
            assert _runs_served(address) == ["first"]
            children = _children(process.pid)
        finally:
            process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    if sys.platform != "win32":
        assert process.returncode == 0
    assert errors == ""
    _wait_until_gone(children)


def test_the_browser_opens_where_there_is_a_display(runs: Path, stop_at_once: None, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(view, "_has_display", lambda: True)
    assert main(["view", str(runs), "--port", "6010"]) == 0
    assert opened == ["http://127.0.0.1:6010/"]


@pytest.mark.parametrize(("options", "display"), [(["--no-browser"], True), ([], False)])
def test_the_browser_stays_shut(
    options: list[str],
    display: bool,
    runs: Path,
    stop_at_once: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(webbrowser, "open", lambda address: pytest.fail("opened a browser"))
    monkeypatch.setattr(view, "_has_display", lambda: display)
    assert main(["view", str(runs), *options]) == 0
    assert "http://127.0.0.1:6006/" in capsys.readouterr().out


def test_a_linux_console_has_no_display(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not view._has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert view._has_display()


def test_by_default_it_looks_in_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["view"]) == 1
    assert capsys.readouterr().err == (
        "torchprobe view: error: 'runs' is not a folder. Record a run first: torchprobe demo\n"
    )


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "notes.txt").write_text("no run")
    assert main(["view", str(tmp_path)]) == 1
    assert "it holds no TensorBoard event file). Record a run first: torchprobe demo" in capsys.readouterr().err


def test_a_taken_port(runs: Path, taken_port: int):
    done = _view(runs, "--port", str(taken_port))
    assert done.returncode == 1
    assert f"--port: {taken_port} is taken. Leave --port out to get a free one." in done.stderr


def test_a_host_that_is_not_this_machine(runs: Path):
    done = _view(runs, "--host", "192.0.2.1")
    assert done.returncode == 1
    assert done.stderr.startswith("torchprobe view: error: TensorBoard cannot listen at 192.0.2.1: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("tensorboard", "the module tensorboard is missing. Run: pip install tensorboard"),
        (
            "pkg_resources",
            "setuptools no longer has from version 82 on. Run: pip install --upgrade 'tensorboard>=2.21'",
        ),
    ],
)
def test_a_tensorboard_that_cannot_be_imported(
    module: str, message: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "tensorboard":
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert main(["view", str(runs), "--no-browser"]) == 1
    assert message in capsys.readouterr().err


@contextlib.contextmanager
def serving(directory: str) -> Iterator[str]:
    """The address at which `torchprobe view` shows a directory."""
    command = [sys.executable, "-W", "ignore", "-m", "torchprobe", "view", directory, "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()
            yield line.split()[-1]
        finally:
            process.kill()
            process.communicate(timeout=60)


def _view(runs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchprobe", "view", str(runs), "--no-browser", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def _runs_served(address: str, seconds: float = 60) -> list[str]:
    """TensorBoard reads the runs after it has started to listen."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        names: list[str] = json.load(fetch(f"{address}data/runs", timeout=60))
        if names:
            return names
        time.sleep(0.1)
    return []


def _children(pid: int) -> list[int]:
    """Processes that pid started, where the system tells."""
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listing.read_text().split()] if listing.exists() else []


def _wait_until_gone(pids: list[int], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if _is_alive(pid)]:
        assert time.monotonic() < deadline, f"left over: {alive}"
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"  # a zombie has ended, and waits for the init process to notice


def test_its_first_page_has_the_overview_pinned(runs: Path):
    with serving(str(runs)) as address:
        where = fetch(address, timeout=60).geturl()
        pins = json.loads(parse_qs(urlsplit(where).query)["pinnedCards"][0])
        tags = [pin["tag"] for pin in pins]
        assert "overview/loss" in tags
        assert tags.index("overview/grad_norm_unclipped") < tags.index("overview/grad_norm")
        assert len(pins) < 10, "the page takes ten, so that the user can add some"
        chosen = f"{address}?tagFilter=loss"
        assert fetch(chosen, timeout=60).geturl() == chosen


@pytest.mark.slow
def test_a_url_is_handed_on_to_tensorboard(s3):
    from torchprobe.records import Record
    from torchprobe.writers.event_file import EventFileWriter

    writer = EventFileWriter("s3://bucket/runs/first")
    writer.write([Record(1, 1.7e9, {"train/loss": 0.5})])
    writer.close()
    with serving("s3://bucket/runs") as address:
        assert _runs_served(address) == ["first"]
        points = json.load(fetch(f"{address}data/plugin/scalars/scalars?run=first&tag=train/loss", timeout=60))
        assert [(step, value) for _, step, value in points] == [(1, 0.5)]


@pytest.mark.slow
def test_a_url_without_a_run(s3, capsys: pytest.CaptureFixture[str]):
    assert main(["view", "s3://bucket/none"]) == 1
    assert "no run is recorded in 's3://bucket/none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://x", "TensorBoard cannot read nowhere:// here (Protocol not known: nowhere). It reads s3://"),
        ("az://x", "TensorBoard cannot read az:// here (Install adlfs"),
    ],
)
def test_a_url_that_tensorboard_cannot_read(url: str, message: str, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("fsspec", reason="needs fsspec")
    if url.startswith("az") and find_spec("adlfs") is not None:
        pytest.skip("adlfs is installed")
    assert main(["view", url]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert ("pip install fsspec adlfs" in said) == (url == "az://x")
    assert len(said.splitlines()) == 1
