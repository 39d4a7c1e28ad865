"""Ranks in one process, over a store of their own: what each would do in its drain thread, done by hand."""

from __future__ import annotations

from collections.abc import Sequence
from time import time
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import torchprobe
from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.step import Arrived, Heading, Share, StepInFlight
from torchprobe.distributed import gatherer as gatherer_module
from torchprobe.distributed import sender as sender_module
from torchprobe.distributed.gatherer import Gatherer
from torchprobe.distributed.mailbox import Mailbox
from torchprobe.distributed.sender import Sender
from torchprobe.distributed.world import World
from torchprobe.records import Record


class Total(torchprobe.Probe):
    """The sum over ranks, as `total/<name>`."""

    source, fields, reduce = "outputs", ("value",), "sum"

    def report(self, name: str, values: Any) -> Any:
        yield f"total/{name}", values["value"]


class FragileStore:
    """A store that can break, without `clone`."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.broken = False
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        if name == "clone":
            raise AttributeError(name)

        def ask(*arguments: Any) -> Any:
            self.asked += 1
            if self.broken:
                raise RuntimeError("Connection reset by peer\n with a long trace")
            return getattr(self._store, name)(*arguments)

        return ask


class _OnHost(StepInFlight):
    """A step whose rows are there."""

    def arrive(self) -> list[Arrived]:
        return self.transfers[0]  # type: ignore[return-value]


class Ranks:
    """Rank 0 and the others of a world, that hand over steps of one probe."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int, store: Any = None, connected: bool = True) -> None:
        self.store = dist.HashStore() if store is None else store
        self.connected = connected
        self.probe = Total(every=1)
        for module in (gatherer_module, sender_module):
            monkeypatch.setattr(module, "is_connected", lambda: self.connected)
            monkeypatch.setattr(module, "open_mailbox", lambda rank: Mailbox(self.store, 1))
        keys = {self.probe: "0:Total"}
        self.decoder = Decoder({})
        self.first = Gatherer(World(0, size), keys, self.decoder)
        self.others = {rank: Sender(World(rank, size), keys) for rank in range(1, size)}

    def see(self, rank: int, step: int, value: float | None, name: str = "x", share: Share | None = None) -> None:
        """A rank hands over a step."""
        shares: Sequence[Share] | None = None if share is None else [share]
        rows = [] if value is None else [Arrived(Heading(self.probe, [name], "", False, shares), np.array([[value]]))]
        sealed = _OnHost(step, time(), {"mine": float(rank)}, transfers=[rows])  # type: ignore[list-item]
        (self.first if rank == 0 else self.others[rank]).read(sealed)

    def send(self, *ranks: int) -> None:
        for rank in ranks:
            assert list(self.others[rank].release(False)) == []

    def written(self, urgent: bool = False) -> list[Record]:
        return list(self.first.release(urgent))

    def totals(self, urgent: bool = False) -> dict[int, float | None]:
        return {record.step: record.values.get("total/x") for record in self.written(urgent)}
