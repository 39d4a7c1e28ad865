"""Asks the process of `tests/warm.py` for a fork with this one's arguments, directory, environment and streams."""

import json
import os
import signal
import socket
import sys

directory = os.getcwd()  # noqa: PTH109 - pathlib takes longer to import than all this
asked = {"arguments": sys.argv[2:], "directory": directory, "environment": dict(os.environ)}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    words = json.dumps(asked).encode()
    socket.send_fds(connection, [len(words).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(words)
    status = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
sys.exit(status)
