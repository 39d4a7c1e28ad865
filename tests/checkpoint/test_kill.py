"""A process that is killed while it saves leaves the checkpoint before, whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path), "1", str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    interrupted, left, files = map(int, result.stdout.split())
    assert interrupted > 0  # some kills did come in the middle of a save
    assert left == 0  # and the next save clears up what these left
    assert files <= 3
