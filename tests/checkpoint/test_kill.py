"""A process that is killed while it saves leaves the checkpoint before, whole, and nothing for long."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests import warm
from tests.checkpoint.run import Run, names
from torchprobe.checkpoint import files
from torchprobe.checkpoint.files import write_file

KILLS = 20

# One process that forks: it imports torch once for all kills. A child reports each step once it is saved.
SCRIPT = """
import os, random, signal, sys, time
import torch
from torchprobe import CheckpointManager

torch.set_num_threads(1)
generator = random.Random(int(sys.argv[2]))


def save_for_ever(report):
    manager = CheckpointManager(sys.argv[1], max_keep=2)
    model = torch.nn.Linear(400, 400)
    last = manager.load_latest()
    step = 0 if last is None else last["step"]
    while True:
        step += 1
        torch.nn.init.constant_(model.weight, step)
        manager.save_checkpoint(model, step=step, metrics={"val_loss": 1.0 / (step % 5 + 1)})
        os.write(report, b"%d " % step)


interrupted = 0
for _ in range(int(sys.argv[3])):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_for_ever(writer)
        finally:
            os._exit(1)
    os.close(writer)
    reported = os.read(reader, 10)
    time.sleep(generator.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    with os.fdopen(reader, "rb") as rest:
        reported += rest.read()
    saved = int(reported.split()[-1])
    interrupted += any(name.endswith(".tmp") for name in os.listdir(sys.argv[1]))
    found = CheckpointManager(sys.argv[1]).load_latest()
    assert found["step"] in (saved, saved + 1), (found["step"], saved)
    assert (found["model"]["weight"] == found["step"]).all()
    assert CheckpointManager(sys.argv[1]).load_best() is not None
manager = CheckpointManager(sys.argv[1], max_keep=2)
manager.save_checkpoint(torch.nn.Linear(4, 4), step=10**6, metrics={"val_loss": 9.0})
left = [name for name in os.listdir(sys.argv[1]) if name.endswith(".tmp")]
print(interrupted, len(left), len(os.listdir(sys.argv[1])))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_lose_nothing_that_was_saved(tmp_path):
    command = [*warm.python(), "-W", "error", "-c", SCRIPT, str(tmp_path), "1", str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    interrupted, left, files = map(int, result.stdout.split())
    assert interrupted > 0  # some kills did come in the middle of a save
    assert left == 0  # and the next save clears up what these left
    assert files <= 3


# ---- what a killed process leaves

HOST = socket.gethostname().replace(".", "-")
WRITING = """
import os, sys
from pathlib import Path
from torchprobe.checkpoint.files import held, temporary
with held(temporary(Path(sys.argv[1])), Path.touch if sys.argv[2] == "file" else Path.mkdir):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def leave(manager, pid, kind, host=HOST):
    path = manager.directory / f".step_0000000003.{kind}.{host}.{pid}.tmp"
    if kind == "pt":
        path.write_bytes(b"half")
    else:
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(b"half")
    return path


@pytest.mark.skipif(os.name != "posix", reason="needs locks that end with a process")
@pytest.mark.parametrize("kind", ["pt", "sharded"])
@pytest.mark.parametrize("pid", [os.getpid(), os.getppid(), 1, 2**22 + 1], ids=["own", "parent", "init", "none"])
def test_what_a_killed_process_left_is_removed_whoever_has_its_number_now(manager, pid, kind):
    left = leave(manager, pid, kind)
    manager.save_checkpoint(*Run().parts, 0, 4, {})
    assert not left.exists()
    assert names(manager) == ["step_0000000004.pt"]


def test_a_leftover_of_this_number_and_step_is_no_hindrance(manager):
    leave(manager, os.getpid(), "pt")
    manager.save_checkpoint(*Run().parts, 0, 3, {})
    assert names(manager) == ["step_0000000003.pt"]
    assert manager.load_latest()["step"] == 3


def test_threads_that_write_one_file_take_turns(manager):
    path = manager.directory / "step_0000000001.pt"

    def write(number):
        for _ in range(5):
            write_file(path, {"number": torch.full((20_000,), number)})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert names(manager) == [path.name]
    assert torch.load(path, weights_only=True)["number"].unique().numel() == 1


@pytest.mark.skipif(os.name != "posix", reason="needs locks that end with a process")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_process_is_writing_stays_until_it_is_killed(manager, kind):
    target = manager.directory / "step_0000000007.pt"
    command = [*warm.python(), "-W", "ignore", "-c", WRITING, str(target), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        writing = int(process.stdout.readline())
        left = manager.directory / f".step_0000000007.pt.{HOST}.{writing}.tmp"
        manager.save_checkpoint(*Run().parts, 0, 8, {})
        assert left.exists()
        os.kill(writing, signal.SIGKILL)
    manager.save_checkpoint(*Run().parts, 0, 9, {})
    assert not left.exists()


def test_on_a_system_without_locks_checkpoints_are_written_and_leftovers_stay(manager, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    left = leave(manager, os.getpid(), "pt")
    manager.save_checkpoint(*Run().parts, 0, 4, {})
    assert left.exists()
    assert manager.load_latest()["step"] == 4


def test_what_another_machine_is_writing_stays(manager):
    left = leave(manager, os.getpid(), "pt", host="elsewhere")
    manager.save_checkpoint(*Run().parts, 0, 4, {})
    assert left.exists()


@pytest.mark.skipif(os.name != "posix", reason="needs locks that end with a process")
@pytest.mark.parametrize(("pid", "stays"), [(os.getpid(), True), (2**22 + 1, False)], ids=["own", "none"])
def test_on_a_file_system_without_locks_the_number_alone_must_do(manager, monkeypatch, pid, stays):
    import fcntl

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = leave(manager, pid, "pt")
    manager.save_checkpoint(*Run().parts, 0, 4, {})
    assert left.exists() == stays
    assert manager.load_latest()["step"] == 4
