"""`torchprobe view`: TensorBoard on the recorded runs, in the browser."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import mimetypes
import os
import sys
import time
import webbrowser
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

from torchprobe.cli.arguments import CommandError, add_command, port_number
from torchprobe.writers.files import located
from torchprobe.writers.remote import protocol_of

_DESCRIPTION = """\
Show recorded runs in TensorBoard: start it, print its address, open the browser.
Its first page has the overview of the runs pinned on top. Ctrl-C ends it.
"""

_EXAMPLES = """\
examples:
  torchprobe view                         every run below ./runs
  torchprobe view runs/demo --port 6010
  torchprobe view s3://bucket/runs        runs in a remote store
  torchprobe view --no-browser            over ssh: forward the port it prints
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options to the command line."""
    about = "show recorded runs in TensorBoard"
    parser = add_command(commands, "view", run, about=about, description=_DESCRIPTION, examples=_EXAMPLES)
    where = "folder or URL of runs (default: runs)"
    parser.add_argument("directory", nargs="?", type=located, default="runs", metavar="DIR", help=where)
    parser.add_argument("--port", type=port_number, metavar="N", help="port (default: the first free one from 6006)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen at; 0.0.0.0 shows the runs to the whole network (default: 127.0.0.1)",
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Returns the exit code."""
    from torchprobe.reports.events import visible  # imports numpy

    _check_has_runs(arguments.directory)
    address = _serve(arguments.directory, arguments.host, arguments.port)
    print(f"TensorBoard shows {visible(str(arguments.directory))} at {address}", flush=True)
    print("Ctrl-C ends it.", flush=True)
    try:
        if not arguments.no_browser and _has_display():
            webbrowser.open(address)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return 0


def _check_has_runs(directory: Path | str) -> None:
    if isinstance(directory, str):
        _tensorboard_program()  # the better message when it is missing
        check_readable(directory)
        return
    from torchprobe.reports.events import event_files_below  # imports numpy

    fix = "Record a run first: torchprobe demo"
    if not directory.is_dir():
        raise CommandError(f"'{directory}' is not a folder. {fix}")
    if not event_files_below(directory):
        raise CommandError(f"no run is recorded in '{directory}' (it holds no TensorBoard event file). {fix}")


def _serve(directory: Path | str, host: str, port: int | None) -> str:
    """Start TensorBoard in a daemon thread of this process, so that nothing can outlive it. Returns its address."""
    program = _tensorboard_program()
    listen = program.create_port_scanning_werkzeug_server
    # Windows may list .js files as plain text, which no browser runs.
    mimetypes.add_type("text/javascript", ".js")
    options = ["tensorboard", "--logdir", str(directory), "--host", host]
    options += [] if port is None else ["--port", str(port)]
    said = io.StringIO()  # advice about TensorBoard's own options, or why it gave up
    try:
        with contextlib.redirect_stderr(said):
            server = program.TensorBoard(_plugins(), server_class=lambda app, flags: listen(with_overview(app), flags))
            server.configure(options)
            address: str = server.launch()
    except program.TensorBoardPortInUseError as error:
        raise CommandError(f"--port: {port} is taken. Leave --port out to get a free one.") from error
    except program.TensorBoardServerException as error:
        raise CommandError(f"TensorBoard cannot listen at {host}: {error.msg}") from error
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("\n")[2]
        raise CommandError(f"TensorBoard cannot listen at {host}: {reason}") from error
    return address


def _plugins() -> list[Any]:
    """TensorBoard's own, those that are installed, and the Probe tab, also where torchprobe is not installed."""
    from tensorboard import default

    from torchprobe.reports.tab import ProbeLoader

    found = default.get_plugins()
    return found if ProbeLoader in found else [*found, ProbeLoader]


def _tensorboard_program() -> ModuleType:
    try:
        from tensorboard import program
    except ModuleNotFoundError as error:
        missing = (
            f"TensorBoard cannot be started, since the module {error.name} is missing. Run: pip install tensorboard"
        )
        if error.name == "pkg_resources":
            missing = (
                "this TensorBoard needs pkg_resources, which setuptools no longer has from version 82 on. "
                "Run: pip install --upgrade 'tensorboard>=2.21'"
            )
        raise CommandError(missing) from error
    module: ModuleType = program
    return module


def _has_display() -> bool:
    """Whether a browser could open a window; on a Linux console it would take over the terminal instead."""
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def check_readable(url: str) -> None:
    """Raise CommandError, saying what to install or what the store answers, unless there is a run at or below it."""
    protocol = protocol_of(url)
    if protocol == "gs" and find_spec("tensorboard_data_server") is not None:
        return  # whose reader knows gs:// by itself
    from tensorboard.backend.event_processing import io_wrapper
    from tensorboard.compat import tf

    try:
        tf.io.gfile.isdir(url)  # raises what the next line would hide
        found = next(iter(io_wrapper.GetLogdirSubdirectories(url)), None)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(protocol)
        fix = f"Run: pip install fsspec {package}" if package else "It reads s3://, gs://, az:// and what fsspec knows"
        raise CommandError(f"TensorBoard cannot read {protocol}:// here ({_line(error)}). {fix}") from error
    except Exception as error:  # stores have exceptions of their own
        raise CommandError(f"'{url}' cannot be read: {_line(error)}") from error
    if found is None:
        raise CommandError(f"no run is recorded in '{url}' (it holds no TensorBoard event file)")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


# The page takes up to ten pins, by hand or from its address; those of tags that a run lacks are not shown.
PINNED = (
    "overview/loss",
    "overview/update_ratio",
    "overview/attention_entropy_min",
    "val/overview/epistemic",
    "val/overview/ece",
    "overview/grad_norm_unclipped",  # the other one is that of the clipping, then
    "overview/grad_norm",
    "overview/epistemic",
    "overview/alerts",
)

App = Callable[[Any, Any], Iterable[bytes]]


def with_overview(app: App) -> App:
    """TensorBoard's WSGI application, whose bare address leads to the address with the pins."""
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    address = f"?pinnedCards={quote(cards)}"

    def serve(environ: Any, start_response: Any) -> Iterable[bytes]:
        if environ.get("PATH_INFO", "/") in ("", "/") and not environ.get("QUERY_STRING"):
            start_response("302 Found", [("Location", address), ("Content-Length", "0")])
            return [b""]
        return app(environ, start_response)

    return serve
