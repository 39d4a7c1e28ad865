"""A watched model that forked workers train (Hogwild): each says once what is recorded, and what is not."""

from __future__ import annotations

import json
import logging
import multiprocessing
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchprobe
from tests import warm
from torchprobe.testing import MemoryWriter

pytestmark = [
    pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

WORK = {"trains": (True, 3), "only reads": (False, 3), "does nothing": (True, 0)}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).share_memory()


def run(model: nn.Module, steps: int, trains: bool = True) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for k in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
        with torch.set_grad_enabled(trains):
            loss = model(x).square().mean()
        if trains:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def work(model: nn.Module, log: Path, steps: int, trains: bool) -> None:
    logging.getLogger("torchprobe").addHandler(logging.FileHandler(log))
    run(model, steps, trains)


def forked(model: nn.Module, folder: str, workers: int, steps: int, trains: bool) -> list[str]:
    """What each worker's log says."""
    torch.optim.SGD(model.parameters(), lr=0.0)  # here, since a first one imports for seconds
    logs = [Path(folder) / f"{i}.log" for i in range(workers)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(model, log, steps, trains)) for log in logs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [log.read_text() for log in logs]


def alone(function: Callable[..., None], *args: Any) -> None:
    """Run in a process of its own, since torch forks none that has run a backward pass."""
    script = f"import json, sys; from {__name__} import {function.__name__} as run; run(*json.loads(sys.argv[1]))"
    ran = subprocess.run(
        [*warm.python(), "-c", script, json.dumps(args)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr


def said_once(folder: str, steps: int, trains: bool) -> None:
    model, writer = net(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        lines = forked(model, folder, 2, steps, trains)
        assert session.step == 0
    for text in lines:
        assert text.count("its passes, gradients and steps are not recorded") == (steps > 0)
        assert text.count("\n") == (steps > 0)
    assert [tag for tag in writer.tags() if tag.startswith(("grad_norm/", "activation_mean/"))] == []


def own_steps(folder: str) -> None:
    model, writer = net(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        before = model[0].weight.detach().clone()
        forked(model, folder, workers=2, steps=4, trains=True)
        assert not torch.equal(model[0].weight, before)
        run(model, 2)
        assert session.step == 2
    assert [step for step, _ in writer.scalars("grad_norm/0.weight")] == [1, 2]
    norm = model[0].weight.double().norm().item()
    assert writer.value("param_norm/0.weight", step=2) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("what", WORK)
def test_each_worker_says_once_that_its_part_is_not_recorded(tmp_path, what):
    trains, steps = WORK[what]
    alone(said_once, str(tmp_path), steps, trains)


def test_the_process_that_records_shows_its_own_steps_and_the_weights_that_it_finds(tmp_path):
    alone(own_steps, str(tmp_path))
