"""Starts the ranks of a scenario file, each a process of its own as torchrun would, and reads what they found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

ROOT = Path(__file__).parents[2]


def need_sharding() -> None:
    """Skip where `fully_shard` cannot run on the CPU."""
    import pytest
    import torch

    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"fully_shard of torch {torch.__version__} does not run on the CPU")


def launch(module: str, ranks: int, out: Path, timeout: float = 150.0) -> list[Any]:
    """What each rank's `main(out)` returned, through JSON; None for a rank that did not get so far.

    Fails when a rank fails that was not meant to (it leaves a file `expected-<rank>` to say that it is).
    """
    port = free_port()
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    code = f"from tests.distributed.launch import run; run({module!r}, {str(out)!r})"
    logs = [(out / f"log-{rank}").open("wb") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=common | {"RANK": str(rank)}, stdout=logs[rank], stderr=logs[rank]
        )
        for rank in range(ranks)
    ]
    try:
        codes = _wait(processes, out, timeout)
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    for rank, code in enumerate(codes):
        assert code == 0 or (out / f"expected-{rank}").exists(), (out / f"log-{rank}").read_text()[-8000:]
    return [_result(out / f"result-{rank}.json") for rank in range(ranks)]


def run(module: str, out: str) -> None:
    """The body of a rank."""
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = importlib.import_module(module).main(Path(out))
    (Path(out) / f"result-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def _wait(processes: list[subprocess.Popen[bytes]], out: Path, timeout: float) -> list[int | None]:
    """Until all have ended, one has failed that should not, or time is up."""
    deadline = monotonic() + timeout
    while monotonic() < deadline and any(process.poll() is None for process in processes):
        if any(process.poll() and not (out / f"expected-{i}").exists() for i, process in enumerate(processes)):
            sleep(1.0)  # for the others' last words
            break
        sleep(0.05)
    return [process.poll() for process in processes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _result(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
