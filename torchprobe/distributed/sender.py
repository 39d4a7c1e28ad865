"""The drain thread's work on every rank but 0: send what was seen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from torchprobe.buffer.drain import Exchange
from torchprobe.buffer.step import Arrived, Reporter, StepInFlight, seen_rows
from torchprobe.distributed.mailbox import (
    Frame,
    FrameEncoder,
    Key,
    Mailbox,
    Numbering,
    Outbox,
    Part,
    Step,
    open_mailbox,
)
from torchprobe.distributed.merge import FindStages, announce
from torchprobe.distributed.world import Stopping, World, is_connected
from torchprobe.messages import log as _log
from torchprobe.probes.base import Reporter as ProbeReporter
from torchprobe.records import Record

CYCLE = 1.0  # seconds between frames, at least
PATIENCE = 10.0  # seconds that `flush` and `detach` give a store that does not answer

MAX_WAITING = 1000  # steps, while there is no store yet
HELD = "parameters"  # where rank 0 says which parameters it sees whole


class Sender(Exchange):
    """Sends the rows of probes to rank 0, names and all; what is logged by hand is rank 0's own affair.

    Rows of parameters that rank 0 sees whole are left out. While rank 0 does not fetch, and once the store is gone,
    steps are dropped and counted.
    """

    patience = PATIENCE

    def __init__(self, world: World, keys: Mapping[Reporter, str], stages: FindStages = tuple) -> None:
        self._dropped = 0
        self._world = world
        self._rank = world.rank
        self._keys = keys
        self._find_stages = stages
        self._announced = False
        self._numbering = Numbering()
        self._encode = FrameEncoder()
        self._steps: list[Step] = []
        self._mark: Key | None = None
        self._held_by_first: frozenset[str] | None = None
        self._mailbox: Mailbox | None = None
        self._outbox: Outbox | None = None
        self.stopping = Stopping(world)
        self._connect()

    @property
    def dropped(self) -> int:
        """Steps that rank 0 does not get."""
        return self._dropped

    def read(self, sealed: StepInFlight) -> Record | None:
        """Take over a step: it goes with the next frame. Raises what a device raised."""
        self._mark = self._numbering.next(sealed.step)
        parts = [part for part in map(self._part, sealed.arrive()) if part is not None]
        if parts and len(self._steps) < MAX_WAITING:
            self._steps.append(Step(self._mark, parts, sealed.same_data))
        else:
            self._dropped += bool(parts)
        return None

    def summary(self) -> str:
        """Which rank this is, and where its values go."""
        lost = f"; steps lost on the way: {self.dropped}" if self.dropped else ""
        return f"this is rank {self._rank} of {self._world.size}, whose values go to rank 0{lost}"

    def pause(self) -> float | None:
        """Other ranks wait for these steps, so they do not wait for the next flush."""
        return self.stopping.pause() or CYCLE

    def release(self, urgent: bool) -> Iterable[Record]:
        """Send what there is."""
        self._connect()
        if self._outbox is not None and self._mark is not None:
            if not self._announced and self._mailbox is not None:
                self._announced = True
                announce(self._mailbox, self._rank, self._find_stages())
            frame, self._steps, self._mark = Frame(self._mark, self._steps), [], None
            self._send(self._outbox, frame)
        self.stopping.poll(self._mailbox)
        return ()

    def close(self) -> None:
        """Nothing follows."""
        if self._outbox is not None:
            self._outbox.send(self._encode(Frame(bye=True)))

    def _connect(self) -> None:
        if self._outbox is not None or not is_connected():
            return
        try:
            self._mailbox = open_mailbox(self._rank)
        except Exception:
            _log.exception("rank %d cannot reach the store of torch.distributed: its values are left out", self._rank)
            return
        self._outbox = Outbox(self._mailbox, self._rank)
        self._outbox.send(self._encode(Frame()))  # rank 0 waits for ranks that have said something

    def _send(self, outbox: Outbox, frame: Frame) -> None:
        if outbox.is_full:
            self._dropped += len(frame.steps)
            frame = Frame(frame.mark)
        held = self._held()
        steps = [
            step._replace(parts=[part for part in step.parts if not _is_known(part, held)]) for step in frame.steps
        ]
        outbox.send(self._encode(Frame(frame.mark, [step for step in steps if step.parts])))
        if self._mailbox is not None and self._mailbox.failed:
            self._dropped += len(frame.steps)

    def _held(self) -> frozenset[str]:
        if self._held_by_first is None and self._mailbox is not None:
            names = self._mailbox.fetch(HELD)
            self._held_by_first = None if names is None else frozenset(json.loads(names))
        return self._held_by_first or frozenset()

    def _part(self, arrived: Arrived) -> Part | None:
        heading = arrived.heading
        key = self._keys.get(heading.reporter)
        if key is None:
            return None
        names, rows = seen_rows(arrived)
        if isinstance(heading.reporter, ProbeReporter):
            heading.reporter.learn(names, rows)
        return Part(key, heading.prefix, names, rows, heading.shares) if len(names) else None


def _is_known(part: Part, held: frozenset[str]) -> bool:
    """Whether rank 0 has the same rows: those of parameters that are whole on every rank."""
    return part.shards is not None and all(
        shard.is_whole and name in held for name, shard in zip(part.names, part.shards, strict=True)
    )
