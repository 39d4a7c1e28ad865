"""Whose attention it is, the nearest module of the model among the callers; and what its calls in a pass add up to."""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Iterator, Mapping
from itertools import takewhile
from types import FrameType
from typing import NamedTuple, TypeAlias
from weakref import ReferenceType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from torchprobe.capture.compat import GRAPH_CALLERS, MODULE_CALL
from torchprobe.capture.frames import instruction_of, place_in, self_of
from torchprobe.naming import ROOT, named_modules
from torchprobe.statistics.attention import FIELDS, MAX_LOGIT, Measured, combine, finish

Path = tuple[tuple[Hashable, ...], ...]

_PASSES_ON = torch.overrides.handle_torch_function.__module__
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")


class Caller(NamedTuple):
    """Where an attention call comes from.

    name: of the module; path: the call sites between the module's own call and this one, which tell two attentions
    of a module apart; heads: how many the module says it has, where it says so.
    """

    name: str
    path: Path
    heads: int | None


INSIDE_GRAPH = Caller("", (), None)
"""The caller where a compiled graph runs its operations one by one: what they are was recorded while it was traced."""


class Owners:
    """The names of a model's modules, and the way from a frame to one of them."""

    def __init__(self, model: ReferenceType[nn.Module]) -> None:
        self._model = model
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of modules, by identity: some define ==
        self._are_new = False

    def begin_pass(self) -> None:
        """Modules may have come and gone: look again, if one is met that has no name."""
        self._are_new = False

    def caller(self, beyond_graphs: bool = False) -> Caller | None:
        """Who is calling, as seen from the caller of this method; None outside the model's modules.

        A compiled graph that is running is nobody, `INSIDE_GRAPH`; beyond_graphs: whoever calls the graph.
        """
        frame: FrameType | None = sys._getframe(1)
        owner: nn.Module | None = None
        path, passed_on = [], False
        while frame is not None:
            if owner is None:
                if not beyond_graphs and _is_graph(frame):
                    return INSIDE_GRAPH
                owner = self._module(frame)
            if owner is not None and frame.f_globals.get("__name__") == MODULE_CALL:
                break
            before, passed_on = passed_on, frame.f_globals.get("__name__") == _PASSES_ON
            if not (before or passed_on or _is_ours(frame)):  # else there is one for each mode on the stack
                path.append(place_in(frame.f_code, instruction_of(frame)))
            frame = frame.f_back
        return None if owner is None else Caller(self._names[owner], tuple(path), heads_of(owner))

    def _module(self, frame: FrameType) -> nn.Module | None:
        found = None if _is_ours(frame) else self_of(frame)
        return found if isinstance(found, nn.Module) and self._is_named(found) else None

    def _is_named(self, module: nn.Module) -> bool:
        model = self._model()
        if module not in self._names and not self._are_new and model is not None:
            self._names = WeakIdKeyDictionary({module: name for name, module in named_modules(model)})
            self._are_new = True
        return module in self._names


def common_owner(one: str, other: str) -> str:
    """The innermost module that contains both: `blocks.0.attn` for `blocks.0.attn.qk` and `blocks.0.attn`."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) or ROOT


def _is_graph(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith("<eval_with_key>") or frame.f_globals.get("__name__") in GRAPH_CALLERS


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(__package__)


def heads_of(module: nn.Module) -> int | None:
    """How many heads a module says it has."""
    for name in _HEADS:
        try:
            found = getattr(module, name, None)
        except Exception:  # a property of the user's, before it can be read
            continue
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
    return None


def constants_of(module: nn.Module) -> Iterator[Tensor]:
    """What a module holds that is of no batch: buffers, and matrices that are its attributes."""
    yield from (buffer for buffer in module._buffers.values() if buffer is not None)
    for value in vars(module).values():
        several = value if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor) else (value,)
        yield from (one for one in several if isinstance(one, Tensor) and one.dim() <= 2 and not is_lazy(one))


class Site(NamedTuple):
    """An attention of a module. Calls that agree in all of this are merged."""

    module: str
    path: Path
    cross: bool
    heads: int
    device: torch.device


class Reading(NamedTuple):
    """What calls of a site add up to.

    found: the statistic of each head; sampled: whether a call's query rows were a sample, which makes its max
    logit a lower bound; kept: what `on_source` returned for the first of the calls that it did for; who: which of the
    module's heads they are, where that is known.
    """

    found: Measured
    sampled: bool
    kept: Tensor | None
    who: tuple[Hashable, ...] | None = None

    @property
    def rows(self) -> Tensor:
        """(heads, fields) of the statistic."""
        return self.found.rows

    def with_logits_of(self, other: Reading | None) -> Reading:
        """The same, whose largest logits are those of another one: of weights no logit is known."""
        rows = self.rows.clone()
        known = other is not None and len(other.rows) == len(rows)
        rows[:, MAX_LOGIT] = other.rows[:, MAX_LOGIT] if other is not None and known else -torch.inf
        return self._replace(found=Measured(rows))

    def without_distances(self, where: Tensor | None = None) -> Reading:
        """The same, of which it is not known how far queries are from keys; where: only if this bool says so."""
        rows, column = self.rows.clone(), FIELDS.index("distance")
        rows[:, column] = torch.nan if where is None else rows[:, column].masked_fill(where, torch.nan)
        return self._replace(found=Measured(rows))


Readings: TypeAlias = Mapping[Site, Reading]
"""By site, in the order of first calls."""


def merged(a: Readings, b: Readings) -> Readings:
    """What two passes recorded, as one."""
    return {**a, **{site: _joined(a.get(site), reading) for site, reading in b.items()}}


def _joined(a: Reading | None, b: Reading) -> Reading:
    if a is None:
        return b
    kept = b.kept if a.kept is None else a.kept
    return Reading(Measured(combine(a.rows, b.rows)), a.sampled or b.sampled, kept, a.who)


Features: TypeAlias = "list[tuple[int | None, Hashable, NDArray[np.int64]]]"
"""Of heads, where among features they are: on which side of the product, of which parameters, and at which index."""


def told_apart(features: Features, many: int) -> tuple[Hashable, ...] | None:
    """Of each head, where it is; None where two are at one place."""
    found = [_place([(side, made, int(at[i])) for side, made, at in features if at[i] >= 0]) for i in range(many)]
    return tuple(found) if len({*found}) == many else None


def _place(features: list[tuple[int | None, Hashable, int]]) -> Hashable:
    """Where one head is: features that both factors share are counted from where theirs begin."""
    own, shared = {one for one in features if one[0] is not None}, dict[Hashable, int]()
    for side, made, at in features:
        if side is None:
            begin = max((start for _, by, start in own if by == made and start <= at), default=0)
            shared[made] = max(shared.get(made, 0), at - begin)
    return frozenset([*own, *((None, made, at) for made, at in shared.items())])


def _are_same(a: Hashable, b: Hashable) -> bool:
    """Whether calls have the same heads, of which one may know less, as where parameters are the queries."""
    if not (isinstance(a, tuple) and isinstance(b, tuple)) or len(a) != len(b):
        return a == b
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, frozenset) and isinstance(y, frozenset)]
    return all(x <= y or y <= x for x, y in pairs)


def _whole(parts: list[Reading]) -> Reading:
    """What calls that have some of the heads each add up to, all heads in the order of first calls."""
    if len(parts) == 1:
        return parts[0]
    rows: dict[Hashable, Tensor] = {}
    for part in parts:
        for head, row in zip(part.who or (), part.rows, strict=True):
            rows[head] = combine(rows[head], row) if head in rows else row
    kept = next((part.kept for part in parts if part.kept is not None), None)
    return Reading(Measured(torch.stack([*rows.values()])), any(part.sampled for part in parts), kept, tuple(rows))


class Sites:
    """What the running pass has recorded, and the names of all attentions so far.

    A module's only attention has the module's name. Of a module that does both, cross-attention has `/cross`
    added; further ones of the same kind, at other call sites, `/2`, `/3` and so on.
    """

    def __init__(self) -> None:
        self._names: dict[Site, str] = {}
        self._readings: dict[Site, dict[Hashable, Reading]] = {}  # by which heads they have
        self._whole: dict[Site, Reading] = {}
        self._refused: set[tuple[str, Path]] = set()
        self._thread: threading.Thread | None = None  # whose pass it is, until it is taken

    @property
    def are_elsewhere(self) -> bool:
        """Whether a pass of another thread is running, or not taken yet."""
        thread = self._thread
        return thread is not None and thread is not threading.current_thread() and thread.is_alive()

    def begin(self) -> None:
        """A pass begins: what nobody took of an earlier one is dropped."""
        self._thread = threading.current_thread()
        self._readings, self._whole = {}, {}
        self._refused.clear()

    def add(self, site: Site, reading: Reading) -> None:
        """Merge one more call. A compiled graph may run where no pass was seen to begin."""
        self._thread = self._thread or threading.current_thread()
        parts = self._readings.setdefault(site if reading.who is None else site._replace(heads=0), {})
        who = next((one for one in parts if _are_same(one, reading.who)), reading.who)
        parts[who] = _joined(parts.get(who), reading)

    def refuse(self, module: str, path: Path) -> None:
        """A call cannot be read: what others at its site say would be a part of it."""
        self._refused.add((module, path))

    def finish(self) -> None:
        """Add up what was measured, together."""
        finish(reading.found for parts in self._readings.values() for reading in parts.values())
        self._whole = {site: _whole([*parts.values()]) for site, parts in self._readings.items()}

    def take(self) -> Readings | None:
        """What this thread's pass has recorded, None when it is nothing; starts anew."""
        if self._thread is None or self.are_elsewhere:
            return None
        refused, self._refused = self._refused, set()
        whole, self._whole, self._readings, self._thread = self._whole, {}, {}, None
        kept = [(site, reading) for site, reading in whole.items() if site[:2] not in refused]
        sized = ((site._replace(heads=site.heads or len(reading.who or ())), reading) for site, reading in kept)
        return {site: reading._replace(who=None) for site, reading in sized} or None

    def named(self, readings: Readings) -> list[tuple[str, Reading]]:
        """Each attention under its name, which it keeps from then on."""
        kinds = {(site.module, site.cross) for site in (*self._names, *readings)}
        for site in readings:
            if site not in self._names:
                both = (site.module, not site.cross) in kinds
                self._names[site] = self._unused(site.module + ("/cross" if site.cross and both else ""))
        return [(self._names[site], reading) for site, reading in readings.items()]

    def _unused(self, name: str) -> str:
        taken = set(self._names.values())
        candidates = (name if n == 1 else f"{name}/{n}" for n in range(1, len(taken) + 2))
        return next(candidate for candidate in candidates if candidate not in taken)
