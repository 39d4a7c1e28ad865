"""An interpreter that has imported torch already: `[*warm.python(), "-c", script]` instead of `sys.executable`.

For scripts of which a test asks what they do or how they end, not what they import: each is a fork of one process, with
the arguments, directory, environment and streams of the command that asks for it, and it ends as an interpreter does.
Who kills the command kills the script with all that it has started.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED = ("torch._dynamo", "torchprobe.session", "torchprobe.testing", "torchprobe.checkpoint")
_ASK = Path(__file__).with_name("warm_client.py")
_SERVE = "from tests.warm import serve; exec(*serve())"


@functools.cache
def python() -> tuple[str, ...]:
    """The beginning of a command: what stands in for `sys.executable`. One process for each that runs tests."""
    if not hasattr(os, "fork"):
        return (sys.executable,)
    path = str(Path(tempfile.mkdtemp(prefix="warm-"), "socket"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _search_path()}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVE, path], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    atexit.register(_end, server, path)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return sys.executable, "-I", "-S", str(_ASK), path


def _end(server: subprocess.Popen[bytes], path: str) -> None:
    server.communicate()  # which closes its standard input
    Path(path).unlink()
    Path(path).parent.rmdir()


def _search_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def serve() -> tuple[Any, dict[str, Any]]:
    """Returns in each child: the code that it runs, and where. The process itself ends with its standard input."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a script's own collector need not go through the libraries, nor copy their pages
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([listening, 0], [], [])
            _reap()
            if 0 in ready:
                os._exit(0)
            connection, _ = listening.accept()
            if os.fork() == 0:
                break
            connection.close()
    return _become(connection)


def _reap() -> None:
    with suppress(ChildProcessError):  # there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become(connection: socket.socket) -> tuple[Any, dict[str, Any]]:
    """The child of the process that waits for it and tells how it ended."""
    with connection:
        length, streams, _, _ = socket.recv_fds(connection, 8, 3)
        asked = json.loads(connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
        child = os.fork()
        if child:
            _tell_the_end(connection, child, streams)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["directory"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    return _code(asked["arguments"])


def _tell_the_end(connection: socket.socket, child: int, streams: list[int]) -> None:
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    end = os.pidfd_open(child)
    select.select([end, connection], [], [])
    if not select.select([end], [], [], 0)[0]:  # the one who asked is gone
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(status.to_bytes(4, "big", signed=True))
    os._exit(0)


def _code(arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """Of `[-W action] -c code ...` and `[-W action] file ...`, and the namespace of a new `__main__`."""
    while arguments[0] == "-W":
        warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
        arguments = arguments[2:]
    main = sys.modules["__main__"].__dict__
    for name in {*main} - {"__name__", "__builtins__", "__loader__", "__spec__"}:
        del main[name]
    if arguments[0] == "-c":
        sys.argv, source, file = ["-c", *arguments[2:]], arguments[1], "<string>"
    else:
        sys.argv, source, file = arguments, Path(arguments[0]).read_text(), arguments[0]
        sys.path[0] = str(Path(file).parent)
        main["__file__"] = file
    return compile(source, file, "exec", dont_inherit=True), main
