"""Which rank this process is, what takes the place of the others where there are none, and how all stop at one step."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch.distributed as dist

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Exchange
from torchprobe.buffer.step import StepInFlight
from torchprobe.distributed.mailbox import Mailbox
from torchprobe.messages import log as _log
from torchprobe.records import Record
from torchprobe.rules.alert import Alert


class World(NamedTuple):
    """The ranks of the default process group. Rank 0 writes."""

    rank: int
    size: int

    @property
    def writes(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0


def world() -> World:
    """The ranks of `torch.distributed`; before `init_process_group` what `torchrun` says in the environment."""
    if is_connected():
        return World(dist.get_rank(), dist.get_world_size())
    if dist.is_available():
        rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        if rank.isdigit() and size.isdigit():
            return World(int(rank), int(size))
    return World(0, 1)


def is_connected() -> bool:
    """Whether the default process group is there."""
    return dist.is_available() and dist.is_initialized()


class SingleProcess(Exchange):
    """The exchange where there is no other rank, or none was known of when the session began.

    Makes records of one process's steps; warns once on a rank that turns out to be one of several.
    """

    stopping = None

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._warned = False

    def read(self, sealed: StepInFlight) -> Record | None:
        """The record of a step. Raises what a device raised."""
        return self._decoder(sealed)

    def release(self, urgent: bool) -> Iterable[Record]:
        """No step was kept back."""
        if not self._warned and is_connected() and world().rank:
            self._warned = True
            _log.warning(
                "torchprobe.instrument was called before init_process_group and without torchrun's RANK and "
                "WORLD_SIZE, so that each rank writes a run of its own, rank %d too: call it after init_process_group "
                "for one run",
                world().rank,
            )
        return ()


# ---- how all ranks stop at the same step, when a rule on rank 0 ends the run
# A rank that stopped by itself would leave the others waiting in their next collective. Nothing is exchanged until a
# rule has fired; from then on no rank goes past its next step boundary before all know where to stop:
# 1. rank 0 leaves the alert in the store;
# 2. each rank's background thread finds it, holds the training thread at its next boundary, and answers with the number
#    of steps that it has completed;
# 3. rank 0 leaves the last of those boundaries, and every rank trains up to it and raises there.

SOON = 0.05  # seconds between looks once a rule has fired
PATIENCE = 10.0  # seconds that a rank is held for the others; then it stops by itself


class Stopping:
    """One rank's part. `propose`, `pause` and `poll` belong to the drain thread, `reached` to the training thread.

    hold: lets the training thread stop at its next boundary and returns the steps completed; set by who wires it,
    where a rule may end the run.
    """

    def __init__(self, world: World) -> None:
        self.hold: Callable[[Alert], int] | None = None
        self._world = world
        self._alert: Alert | None = None
        self._completed = 0
        self._published = False
        self._agreed = threading.Event()
        self._at = 0

    def propose(self, alert: Alert, completed: int) -> None:
        """A rule of rank 0 ends the run; its training thread is held already, after so many steps."""
        if self._world.writes:
            self._alert, self._completed = alert, completed

    def pause(self) -> float | None:
        """Look again soon while the ranks agree."""
        return None if self._alert is None or self._agreed.is_set() else SOON

    def poll(self, mailbox: Mailbox | None) -> None:
        """One look at what the others say. Never waits."""
        if mailbox is None or self.hold is None or self._agreed.is_set():
            return
        if self._world.writes:
            self._lead(mailbox)
        else:
            self._follow(mailbox, self.hold)

    def reached(self, completed: int) -> bool:
        """Whether this is the boundary to stop at. Waits until it is known, up to PATIENCE."""
        if self._agreed.wait(PATIENCE):
            return completed >= self._at
        _log.warning("not all ranks have answered for %g s: this one stops by itself", PATIENCE)
        return True

    def _lead(self, mailbox: Mailbox) -> None:
        if self._alert is None:
            return
        if not self._published:
            self._published = True
            mailbox.put("stop", json.dumps(dataclasses.asdict(self._alert)).encode())
        answers = [mailbox.fetch(f"stop/{rank}") for rank in range(1, self._world.size)]
        completed = [int(answer) for answer in answers if answer is not None]
        if len(completed) == len(answers):
            self._agree(max([self._completed, *completed]) + 1)
            mailbox.put("stop/at", str(self._at).encode())

    def _follow(self, mailbox: Mailbox, hold: Callable[[Alert], int]) -> None:
        if self._alert is None:
            said = mailbox.fetch("stop")
            if said is None:
                return
            self._alert = Alert(**json.loads(said))
            mailbox.put(f"stop/{self._world.rank}", str(hold(self._alert)).encode())
        at = mailbox.fetch("stop/at")
        if at is not None:
            self._agree(int(at))

    def _agree(self, at: int) -> None:
        self._at = at
        self._agreed.set()
