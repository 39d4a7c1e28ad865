"""Where all ways to find attention deliver what they found: statistics are computed, and what is not is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from torchprobe.capture.attention import stack
from torchprobe.capture.attention.layout import alike, blocked, plain
from torchprobe.capture.attention.padding import Padding
from torchprobe.capture.attention.places import Places
from torchprobe.capture.attention.sites import Caller, Owners, Reading, Site, Sites
from torchprobe.capture.compat import under_transform
from torchprobe.capture.gate import Gate, no_autocast
from torchprobe.capture.predictions.forms import Generators
from torchprobe.messages import log as _log
from torchprobe.statistics import dtypes
from torchprobe.statistics.attention import QueryKey, Rows, Source, choose, is_sampled, measure, sees_older_behind
from torchprobe.statistics.attention.sources import Shape

OnSource: TypeAlias = "Callable[[str, Source, torch.Generator], Tensor | None]"

SECOND_THREAD = "a forward pass beside another one, in a second thread"
_OUTSIDE = "calls from outside of the model's modules"


class Uncovered(Counter[str]):
    """How often each reason not to record an attention was met."""

    def add(self, reason: str) -> None:
        """One more call; the first of a reason is logged."""
        if not self[reason]:
            _log.warning("attention is not recorded for %s; the model runs as ever", reason)
        self[reason] += 1


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of an attention: who calls it, and what its queries are.

    places: where its queries stand, where that is known.
    """

    caller: Caller
    cross: bool
    places: Places | None = None


class Observer:
    """Computes the statistics of calls, outside of the user's modes, autocast and random numbers.

    rows: query rows a head to read at each call, or "all". on_source: called at each attention with the module's name,
    what its statistics are computed from, and a private generator; what it returns is kept. Nothing else of a call is.
    """

    def __init__(
        self, model: ReferenceType[nn.Module], gate: Gate, rows: int | Literal["all"], on_source: OnSource
    ) -> None:
        self.gate = gate
        self.owners = Owners(model)
        self.sites = Sites()
        self.uncovered = Uncovered()
        self.padding = Padding()
        self.off = False
        self._rows = rows
        self._on_source = on_source
        self._choices: dict[Any, Rows] = {}
        self._generators = Generators()
        self.stands: dict[tuple[int, int, int], set[Any]] = {}  # see `dot_product.Stands`
        self._alone: dict[Caller, frozenset[tuple[int, int]]] = {}

    @property
    def idle(self) -> bool:
        """Whether calls are not looked at."""
        return self.off or self.gate.failed

    def begin_pass(self, off: bool) -> None:
        """A pass begins; off: it is followed, for the sake of compiled graphs, and not recorded."""
        self.off = off
        self.owners.begin_pass()
        self.padding.clear()
        self._choices.clear()
        self._alone.clear()
        self.sites.begin()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around everything that is not the user's call: no mode sees it, and an error ends the probe alone."""
        # What is kept outlives the user's inference mode.
        with self.gate.boundary(), stack.unseen(), torch.inference_mode(False), torch.no_grad():
            yield

    def refuses(self, caller: Caller | None, *tensors: Tensor | None) -> bool:
        """Whether the statistics of a call cannot be had, which is counted."""
        reason = "torch.func transforms" if under_transform() else unusual(*tensors)
        reason = reason or (_OUTSIDE if caller is None else None)
        if reason is not None:
            self.uncovered.add(reason)
        return reason is not None

    def source(self, caller: Caller, source_of: Callable[[int | None], QueryKey]) -> QueryKey | None:
        """What `source_of` makes of the caller's number of heads; None, counted, for shapes of no known form."""
        try:
            return source_of(caller.heads)
        except ValueError:
            self.uncovered.add(f"calls in {caller.name}, whose shapes are of no known form")
            return None

    def read(self, call: Call, source: Source) -> Reading:
        """The statistic of a call, not recorded yet."""
        device = source.device
        generator = self._generators.of(device)
        with no_autocast(device):
            found = measure(source, self._chosen(source, generator))
            kept = self._on_source(call.caller.name, source, generator)
        reading = Reading(found, is_sampled(source, self._rows), kept)
        where = call.places
        if where is None or where.unknown or where.cross or not where.open:
            return reading
        older = sees_older_behind(source)
        if older.is_cpu and older.numpy():  # in host memory: no wait
            self._say_distances(call.caller.name)
        return reading.without_distances(older)

    def _say_distances(self, name: str) -> None:
        self.uncovered.add(f"distances in {name}, where its queries stand is not known")

    def _chosen(self, source: Source, generator: torch.Generator) -> Rows:
        """The query rows to read: the same in all attentions of a pass that have as many."""
        key = (source.shape.batch, source.shape.queries, source.device)
        if key not in self._choices:
            self._choices[key] = choose(source, self._rows, generator)
        return self._choices[key]

    def record_source(self, call: Call, source: QueryKey, who: tuple[Hashable, ...] | None = None) -> None:
        """Read a call and add it to its site. who: which of the module's heads it has, where that is known."""
        if (where := call.places) is not None:
            if where.open and source.mask is None and not source.causal:
                call = replace(call, places=replace(where, unknown=True))
            if source.mask is not None and (hidden := _hidden(source.mask, source.shape)) is not None:
                self.padding.note(where, hidden)
            if source.mask is not None and source.mask.dim() == 4:
                self.padding.hold_against(where, plain(source.mask))
            padding = self.padding.of(where, source.shape.batch, source.shape.queries)
            source = replace(source, padding=padding, places=where.on(source.device))
        known = who is not None and len(who) == source.shape.heads
        self.record(call, self.read(call, source)._replace(who=who if known else None))

    def record(self, call: Call, reading: Reading, name: str | None = None) -> None:
        """Add a reading to its site; name: of the module, if not the caller's."""
        if call.places is not None and (call.places.unknown or self._is_step(call, call.places)):
            self._say_distances(name or call.caller.name)
            reading = reading.without_distances()
        found = reading.found
        self.sites.add(Site(name or call.caller.name, call.caller.path, call.cross, found.heads, found.device), reading)

    def _is_step(self, call: Call, places: Places) -> bool:
        """Whether a query alone is not the one that was there before, as in steps of a decoder."""
        return places.alone is not None and self._alone.setdefault(call.caller, places.alone) != places.alone

    def finish(self) -> None:
        """The pass has ended: what it measured is added up, all attentions together; nothing else of it is held."""
        self.sites.finish()
        self.padding.clear()
        self._choices.clear()


def unusual(*tensors: Tensor | None) -> str | None:
    """Why statistics of these tensors cannot be computed, or None."""
    return next((reason for tensor in tensors if tensor is not None and (reason := _unusual(tensor))), None)


def _unusual(tensor: Tensor) -> str | None:
    if tensor.is_nested:
        return "nested tensors"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and type(tensor) not in dtypes.PLAIN:
        return f"tensors of type {type(tensor).__name__}"
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return "sparse or meta tensors"
    if not tensor.dtype.is_floating_point and tensor.dtype is not torch.bool:
        return f"tensors of {tensor.dtype}"
    return None


def _hidden(mask: Tensor, shape: Shape) -> Tensor | None:
    """What a mask hides that is one for all heads and queries: bool (batch, keys); nothing for any other mask."""
    mask = plain(mask)
    if mask.dim() != 4 or mask.size(0) != shape.batch or mask.size(-1) != shape.keys or shape.batch < 2:
        return None
    return alike(blocked(mask))
