"""Where all ways to find attention deliver what they found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchprobe.capture.attention.owner import Caller, Owners
from torchprobe.capture.attention.padding import padded_queries
from torchprobe.capture.attention.reading import Reader, Reading
from torchprobe.capture.attention.sites import Site, Sites
from torchprobe.capture.attention.uncovered import Uncovered
from torchprobe.capture.compat import no_dispatch_modes, no_torch_function
from torchprobe.capture.gate import Gate
from torchprobe.statistics.attention import QueryKey, Source


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of an attention: who calls it, and what its queries are.

    padding: bool (batch, queries), where the call itself says which queries are padded.
    """

    caller: Caller
    cross: bool
    padding: Tensor | None = None


@dataclass(slots=True)
class Observer:
    """The parts of the capture that its sources share, and the state of the running pass."""

    gate: Gate
    owners: Owners
    reader: Reader
    sites: Sites
    uncovered: Uncovered
    training: bool = True
    off: bool = False  # the pass is followed, for the sake of compiled graphs, and not recorded

    @property
    def idle(self) -> bool:
        """Whether calls are not looked at."""
        return self.off or self.gate.failed

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around everything that is not the user's call: no mode sees it, and an error ends the probe alone."""
        # What is kept outlives the user's inference mode.
        with (
            self.gate.boundary(),
            no_torch_function(),
            no_dispatch_modes(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield

    def padding(self, call: Call, mask: Tensor | None, queries: int, keys: int, batch: int) -> Tensor | None:
        """Which queries are padded: as the call says, or as the mask of a self-attention shows."""
        if call.padding is not None or mask is None or call.cross or queries != keys:
            return call.padding
        return padded_queries(mask, batch, queries)

    def read(self, call: Call, source: Source) -> Reading:
        """The statistic of a call, not recorded yet."""
        return self.reader.read(call.caller.name, source)

    def record_source(self, call: Call, source: QueryKey, training: bool) -> None:
        """Read a call and add it to its site."""
        batch, _, queries, keys = source.shape
        source = replace(source, padding=self.padding(call, source.mask, queries, keys, batch))
        self.record(call, self.read(call, source), training=training)

    def record(self, call: Call, reading: Reading, name: str | None = None, training: bool | None = None) -> None:
        """Add a reading to its site; name: of the module, if not the caller's; training: if not the running pass's."""
        rows = reading.rows
        site = Site(name or call.caller.name, call.caller.path, call.cross, rows.size(0), rows.device)
        self.sites.add(site, reading, self.training if training is None else training)
