"""The drain thread's work on rank 0: keep each step until the other ranks' part of it is there, then combine."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import monotonic, sleep, time
from typing import NamedTuple

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Exchange
from torchprobe.buffer.step import Arrived, Reporter, StepInFlight, seen_rows
from torchprobe.distributed.mailbox import FrameDecoder, Inbox, Key, Mailbox, Numbering, Part, Step, open_mailbox
from torchprobe.distributed.merge import Combiner, FindStages, StageNames, announced, same_data_groups
from torchprobe.distributed.sender import HELD
from torchprobe.distributed.world import Stopping, World, is_connected
from torchprobe.messages import log as _log
from torchprobe.records import Record

POLL = 0.25  # seconds between looks while steps wait
URGENT_POLL = 0.005
PATIENCE = 30.0  # seconds that a step waits for a rank that lags
URGENT_PATIENCE = 5.0  # the same while the user waits for `flush` or `detach`
GRACE = 2.0  # seconds from the first step on in which a rank may still call `instrument`
MAX_WAITING = 1000  # steps


class Peer:
    """What a rank has sent and rank 0 has not used yet, and whether it is worth waiting for more.

    late: it was waited for in vain; until it says something it is not waited for again. has_left: it said that nothing
    follows. lost: it said what cannot be read, and names that came with it are missing: nothing of it counts any more.
    """

    def __init__(self, rank: int, inbox: Inbox) -> None:
        self.rank = rank
        self.heard = False
        self.late = False
        self.lost = False
        self.same_data: Sequence[int] = ()
        self.too_late = 0  # steps that came after their record was written
        self.has_left = False
        self._inbox = inbox
        self._decode = FrameDecoder()
        self._mark: Key | None = None
        self._steps: dict[Key, Step] = {}

    def poll(self, used: Key) -> None:
        """Take in what has arrived; steps up to `used` come too late."""
        for data in self._inbox.receive():
            if self.lost:
                continue
            try:
                frame = self._decode(data)
            except Exception:
                _log.exception("what rank %d sent cannot be read: it is left out from now on", self.rank)
                self.lost = True
                continue
            self.heard, self.late, self.has_left = True, False, frame.bye
            self._mark = frame.mark or self._mark
            fresh = [step for step in frame.steps if step.key > used]
            self.too_late += len(frame.steps) - len(fresh)
            self._steps.update({step.key: step for step in fresh})

    @property
    def is_here(self) -> bool:
        """Whether it was heard of, and lately."""
        return self.heard and not self.late and not self.lost

    def owes(self, key: Key) -> bool:
        """Whether a step may still come from this rank, and is worth waiting for."""
        if not self.is_here or self.has_left:
            return False
        return self._mark is None or self._mark < key

    def give_up(self, key: Key) -> None:
        """It was waited for in vain."""
        if self.heard:
            self.late = True
            _log.warning("rank %d is late with step %d: it is left out until it is back", self.rank, key.step)

    def take_until(self, key: Key) -> Iterator[tuple[Key, Sequence[Part]]]:
        """The steps up to this one, which are used now."""
        for early in sorted(k for k in self._steps if k <= key):
            step = self._steps.pop(early)
            self.same_data = step.same_data or self.same_data
            yield early, step.parts


class Waiting(NamedTuple):
    """A step of rank 0 whose rows are on the host."""

    key: Key
    sealed: StepInFlight
    arrived: list[Arrived]
    since: float


class Gatherer(Exchange):
    """Combines the steps of rank 0 with what the others have sent of them, in order.

    A rank that lags by more than PATIENCE is left out, with one line in the log, until it is heard of again: its
    values are missing from means, and sharded parameters from the step. Ranks that never called `instrument` are
    not waited for. It takes no leave: the others notice when they leave.
    """

    def __init__(
        self, world: World, keys: Mapping[Reporter, str], decoder: Decoder, stages: FindStages = tuple
    ) -> None:
        self.late_steps = 0  # written while some rank was absent
        self._world = world
        self._keys = keys
        self._decoder = decoder
        self._combiner = Combiner({key: reporter for reporter, key in keys.items()})
        self._numbering = Numbering()
        self._waiting: deque[Waiting] = deque()
        self._used = Key(0, 0, 0)
        self._same_data: Sequence[int] = ()
        self._first_step_at: float | None = None
        self._published = False
        self._find_stages = stages
        self._names: StageNames | None = None
        self._mailbox: Mailbox | None = None
        self._peers: list[Peer] = []
        self.stopping = Stopping(world)
        self._connect()

    @property
    def dropped(self) -> int:
        """Steps of other ranks that came too late, and steps without a part of a sharded parameter."""
        return self._combiner.incomplete + sum(peer.too_late for peer in self._peers)

    @property
    def absent(self) -> list[int]:
        """Ranks that have said nothing, or nothing for long, or that cannot be heard any more."""
        cut_off = self._mailbox is None or self._mailbox.failed
        heard = {peer.rank for peer in self._peers if peer.is_here and (peer.has_left or not cut_off)}
        return [rank for rank in range(1, self._world.size) if rank not in heard]

    def summary(self) -> str:
        """How many ranks, which of them are missing, and in how many steps one was."""
        absent = ", ".join(map(str, self.absent))
        lost = [f"absent or late: {absent}"] if absent else []
        lost += [f"steps that lack a rank: {self.late_steps}"] if self.late_steps else []
        return "; ".join([str(self._world.size), *lost])

    def read(self, sealed: StepInFlight) -> Record | None:
        """Keep a step for `release`. Raises what a device raised."""
        key = self._numbering.next(sealed.step)
        self._waiting.append(Waiting(key, sealed, sealed.arrive(), monotonic()))
        self._first_step_at = self._first_step_at or monotonic()
        return None

    def pause(self) -> float | None:
        """Look again soon while a step waits, or the ranks agree where to stop."""
        return self.stopping.pause() or (POLL if self._waiting and self._mailbox is not None else None)

    def release(self, urgent: bool) -> Iterable[Record]:
        """The records of steps for which nobody needs to be waited any more."""
        self._connect()
        self._poll()
        if urgent:
            self._hurry()
        while self._waiting and (urgent or self._is_ready(self._waiting[0])):
            yield from self._records(self._waiting.popleft())
        self.stopping.poll(self._mailbox)

    def _connect(self) -> None:
        if self._mailbox is not None or not is_connected():
            return
        try:
            self._mailbox = open_mailbox(self._world.rank)
        except Exception:
            _log.exception("rank 0 cannot reach the store of torch.distributed: it shows its own values only")
            return
        self._peers = [Peer(rank, Inbox(self._mailbox, rank)) for rank in range(1, self._world.size)]

    def _poll(self) -> None:
        for peer in self._peers:
            peer.poll(self._used)

    def _hurry(self) -> None:
        deadline = monotonic() + URGENT_PATIENCE
        while self._waiting and self._owing(self._waiting[-1]):
            if monotonic() > deadline:
                self._give_up(self._waiting[-1])
                return
            sleep(URGENT_POLL)
            self._poll()

    def _is_ready(self, head: Waiting) -> bool:
        if not self._owing(head):
            return True
        if monotonic() - head.since > PATIENCE:
            self._give_up(head)
            return True
        return len(self._waiting) > MAX_WAITING

    def _owing(self, waiting: Waiting) -> list[Peer]:
        """Ranks that are expected to send their part of a step yet."""
        if self._mailbox is None or self._mailbox.failed:
            return []
        early = self._first_step_at is not None and monotonic() - self._first_step_at < GRACE
        return [peer for peer in self._peers if peer.owes(waiting.key) or (early and not peer.heard)]

    def _give_up(self, waiting: Waiting) -> None:
        for peer in self._owing(waiting):
            peer.give_up(waiting.key)

    def _records(self, waiting: Waiting) -> Iterator[Record]:
        parts: dict[Key, dict[int, Sequence[Part]]] = {}
        self._names = names = self._names or self._name_stages()
        for peer in self._peers:
            for key, some in peer.take_until(waiting.key):
                parts.setdefault(key, {})[peer.rank] = names.of(peer.rank, some)
        self._used = waiting.key
        of_step = parts.pop(waiting.key, {})
        for key in sorted(parts):  # steps in which rank 0 saw nothing
            yield from self._record(StepInFlight(key.step, time(), {}), [], parts[key], names)
        self.late_steps += bool(self.absent)
        yield from self._record(waiting.sealed, waiting.arrived, of_step, names)

    def _name_stages(self) -> StageNames:
        own = self._find_stages()
        if not own or self._mailbox is None:
            return StageNames({})
        mailbox = self._mailbox
        return StageNames({0: own, **{peer.rank: announced(mailbox, peer.rank) for peer in self._peers}})

    def _record(
        self, sealed: StepInFlight, arrived: list[Arrived], others: Mapping[int, Sequence[Part]], names: StageNames
    ) -> Iterator[Record]:
        self._same_data = sealed.same_data or self._same_data
        local = [self._part(part) for part in arrived if part.heading.reporter in self._keys]
        own = names.of(0, local)
        if own is local:
            self._publish(own)
        own_only = [part for part in arrived if part.heading.reporter not in self._keys]
        known = {0: self._same_data, **{peer.rank: peer.same_data for peer in self._peers}}
        groups = same_data_groups({rank: names.on_same_data(rank, some) for rank, some in known.items()})
        together = self._combiner({0: own, **others}, groups)
        record = self._decoder.record(sealed, [*own_only, *together])
        if record is not None:
            yield record

    def _part(self, arrived: Arrived) -> Part:
        names, rows = seen_rows(arrived)
        return Part(self._keys[arrived.heading.reporter], arrived.heading.prefix, names, rows, arrived.heading.shares)

    def _publish(self, parts: Sequence[Part]) -> None:
        """Once: the parameters that rank 0 sees whole, which the others need not send."""
        names = {n for part in parts for n, shard in zip(part.names, part.shards or ()) if shard.is_whole}  # noqa: B905
        if names and not self._published and self._mailbox is not None:
            self._published = True
            self._mailbox.put(HELD, json.dumps(sorted(names)).encode())
