"""Ranks that die, lag or never come; run by `test_rough.py`. No rank waits for another but through torchprobe."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from time import sleep
from typing import Any

import torch
import torch.distributed as dist

import torchprobe
from tests.distributed import training as t
from torchprobe.distributed import gatherer
from torchprobe.testing import MemoryWriter

PATIENCE = 1.5


def die_in_the_middle(out: Path) -> Any:
    """Rank 2 is killed in its fourth step of six. Rank 0 writes an event file."""
    rank = dist.get_rank()
    model = t.transformer()
    session = torchprobe.instrument(model, log_dir=out / "run", probes=t.probes(), flush_every=1)

    def between(k: int) -> None:
        if rank == 2 and k == 2:
            session.flush()
            (out / "expected-2").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0 and k == 2:
            wait_for(lambda: session._outlet.drain._exchange._peers[1]._mark is not None)

    t.train(model, [[t.tokens(k)[rank : rank + 2]] for k in range(6)], between)
    return {"detached": session.detach(), "summary": session.summary()}


def lag(out: Path) -> Any:
    """Rank 1 makes one step and no further; rank 0 flushes and detaches."""
    rank, model, writer = dist.get_rank(), t.transformer(), MemoryWriter()
    session = torchprobe.instrument(model, writer=writer, probes=t.probes())
    if rank == 1:
        t.train(model, [[t.tokens(0)]])
        session.flush()
        wait_for((out / "lagged").exists)
        session.detach()
        return None
    t.train(model, [[t.tokens(k)] for k in range(3)])
    flushed = session.flush()
    absent = session._outlet.drain._exchange.absent
    detached = session.detach()
    (out / "lagged").touch()
    return {"flushed": flushed, "detached": detached, "absent": absent, "values": t.values(writer)}


def lose_rank_0(out: Path) -> Any:
    """Rank 0, in whose process the store lives, is killed; rank 1 trains on."""
    rank, model = dist.get_rank(), t.transformer()
    session = torchprobe.instrument(model, writer=MemoryWriter(), probes=t.probes(), flush_every=1)
    t.train(model, [[t.tokens(0)]])
    session.flush()
    (out / f"stepped-{rank}").touch()
    if rank == 0:
        wait_for((out / "stepped-1").exists)
        (out / "expected-0").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for((out / "expected-0").exists)
    sleep(0.2)
    t.train(model, [[t.tokens(k)] for k in range(3)])
    session.flush()
    before = [p.detach().clone() for p in model.parameters()]
    session.detach()
    return {"steps": session.step, "trained": all(torch.isfinite(p).all() for p in before)}


def wait_for(condition: Any) -> None:
    while not condition():
        sleep(0.02)


def main(out: Path) -> Any:
    gatherer.PATIENCE = gatherer.URGENT_PATIENCE = PATIENCE
    found = {"die": die_in_the_middle(out), "lag": lag(out)}
    (out / f"so-far-{dist.get_rank()}.json").write_text(json.dumps(found))
    return found | {"lost": lose_rank_0(out)}
