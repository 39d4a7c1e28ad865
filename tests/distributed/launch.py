"""Starts the ranks of a scenario file, each a process of its own as torchrun's are, and reads what they found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from tests import warm

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
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    code = f"from tests.distributed.launch import fork; fork({module!r}, {str(out)!r}, {ranks})"
    with (out / "log").open("wb") as log:
        process = subprocess.Popen([*warm.python(), "-c", code], env=environment, stdout=log, stderr=log)
        try:
            codes = _wait(process, ranks, out, timeout)
        finally:
            process.kill()  # and with it all that it started, see there
            process.wait()
    for rank, code in enumerate(codes):
        assert code == 0 or (out / f"expected-{rank}").exists(), _words(out, rank)
    return [_result(out / f"result-{rank}.json") for rank in range(ranks)]


def fork(module: str, out: str, ranks: int) -> None:
    """The process that imports, once, what all ranks need, and then becomes them: a child each, as of torchrun."""
    import importlib

    for needed in ("torch._dynamo", module):  # the former as the first optimizer does
        importlib.import_module(needed)
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ["RANK"] = str(rank)
            log = os.open(Path(out, f"log-{rank}"), os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            return run(module, out)
        children[child] = rank
    while children:
        child, status = os.wait()
        Path(out, f"code-{children.pop(child)}").write_text(str(os.waitstatus_to_exitcode(status)))
    return None


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


def _wait(process: subprocess.Popen[bytes], ranks: int, out: Path, timeout: float) -> list[int | None]:
    """Until all have ended, one has failed that should not, or time is up."""
    deadline = monotonic() + timeout
    while monotonic() < deadline and process.poll() is None:
        if any(code and not (out / f"expected-{i}").exists() for i, code in enumerate(_codes(ranks, out))):
            sleep(1.0)  # for the others' last words
            break
        sleep(0.05)
    return _codes(ranks, out)


def _codes(ranks: int, out: Path) -> list[int | None]:
    """How each rank ended; None: it has not."""
    words = [path.read_text() if path.exists() else "" for path in (out / f"code-{rank}" for rank in range(ranks))]
    return [int(word) if word else None for word in words]


def _words(out: Path, rank: int) -> str:
    """What a rank said, or before there were ranks."""
    log = out / f"log-{rank}"
    return (log if log.exists() else out / "log").read_text()[-8000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _result(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
