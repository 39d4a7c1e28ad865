"""Another rank, as rank 0 knows it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from torchprobe.distributed.frames import Decoder, Part, Step
from torchprobe.distributed.mailbox import Inbox
from torchprobe.distributed.numbering import Key

_log = logging.getLogger("torchprobe")


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
        self._decode = Decoder()
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

    def take_until(self, key: Key) -> Iterator[tuple[Key, Sequence[Part]]]:
        """The steps up to this one, which are used now."""
        for early in sorted(k for k in self._steps if k <= key):
            step = self._steps.pop(early)
            self.same_data = step.same_data or self.same_data
            yield early, step.parts
