"""Gradients, parameters and updates, as one optimizer's step sees them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.step import WHOLE, Piece, Share
from torchprobe.capture import sharding
from torchprobe.capture.backward import LeftGradients, loss_scale
from torchprobe.capture.optimizers import State
from torchprobe.capture.sharding import (
    Named,
    by_device,
    dense,
    is_unreduced,
    local_part,
    share_like,
    share_of,
    unscaled,
)
from torchprobe.messages import log as _log
from torchprobe.naming import named_parameters
from torchprobe.probes.base import Probe, Reporter
from torchprobe.statistics import norms
from torchprobe.statistics.dtypes import PLAIN, measurable

_STATES = ("momenta", "second_moments")
_MOVED = "parameters and updates of a step are left out where weights were moved after it and no training pass followed"
_SOURCES = ("gradients", "parameters", "updates", *_STATES)


class Held(NamedTuple):
    """A parameter that an optimizer holds, under its name, and what this rank has of it."""

    name: str
    parameter: nn.Parameter
    share: Share


class ParameterSource:
    """Feeds the probes of gradients, parameters and updates with the tensors of an optimizer's step.

    Tensors are handed over in lists, one list a device, so that a statistic is a few fused kernels. Of a sharded
    parameter the probes see this rank's part. Parameters are read when the next training pass begins, so that what a
    wrapper or a hook did to them after the step is seen too; those that `fully_shard` moves about, at once. Where no
    pass follows, as at the end, they count if nothing has moved them since the step, or if something did before, too.
    """

    def __init__(
        self,
        model: ReferenceType[nn.Module],
        reporters: Sequence[Reporter],
        wanted: Callable[[Sequence[Named], Probe], list[Named]],
    ) -> None:
        self._model = model
        self._of = {source: [r for r in reporters if r.source == source] for source in _SOURCES}
        self._wanted = wanted
        self.left = LeftGradients()
        self._before: dict[str, Tensor] = {}
        self._room: dict[str, Tensor] = {}
        self._stepped: list[tuple[frozenset[Reporter], list[Held], dict[str, Tensor], list[int]]] = []
        self._moves: set[str] = set()  # whose first parameter something else had moved when a training pass followed
        self._said: set[str] = set()
        self._flat: Mapping[int, Share] = {}
        self._stepping: tuple[Optimizer, list[Held]] | None = None  # while an optimizer's step runs: the walk is dear

    @property
    def same_data(self) -> tuple[int, ...]:
        """The ranks that compute on the same examples as this one, when parameters are spread over them."""
        model = self._model()
        return () if model is None else sharding.ranks_on_same_data(model)

    def gradients(self, optimizer: Optimizer, due: frozenset[Reporter], parts: int = 1) -> Iterator[Piece]:
        """Rows of the gradients that this optimizer uses, by its scale. parts: by which a pipeline has divided them."""
        reporters = self._due("gradients", due)
        if reporters:
            held = self._held(optimizer)
            used = {named.name: named for named in unscaled(self._gradients(held), optimizer)}
            for piece in self._pieces(reporters, list(used.values())):
                yield piece
                yield from self._changed(piece, used, loss_scale(optimizer), parts)
            yield from self._gone(reporters, [one for one in held if one.parameter.grad is None])

    def of_captured(self, optimizer: Optimizer) -> Iterator[tuple[Reporter, list[Named]]]:
        """The gradients that a step uses which becomes part of a graph of the device, for each of their probes."""
        self._stepping = None
        if not isinstance(getattr(optimizer, "grad_scale", None), Tensor):
            named = self._gradients(self._held(optimizer))
            yield from ((reporter, self._chosen(reporter, named)) for reporter in self._of["gradients"])

    def backward_begins(self, due: frozenset[Reporter], early: Collection[int] = ()) -> None:
        """A backward pass begins in a step that samples these. early: parameters that it has reached before."""
        self._look(due, self.left.begin, early)

    def backward_ended(self, due: frozenset[Reporter]) -> None:
        """It has ended, and so has what others do at its end, such as the sum over ranks."""
        self._look(due, self.left.end)

    def _look(self, due: frozenset[Reporter], at: Callable[[list[Named]], None], early: Collection[int] = ()) -> None:
        model = self._model()
        comparing = [reporter for reporter in self._due("gradients", due) if _changes_of(reporter)]
        if comparing and model is not None:
            with comparing[0].gate.boundary(), torch.no_grad():
                named = named_parameters(model)
                at(self._gradients([(name, p, WHOLE) for name, p in named if not early or id(p) not in early]))

    def _gradients(self, held: Iterable[tuple[str, nn.Parameter, Share]]) -> list[Named]:
        usable = [(name, p, g, s) for name, p, s in held if (g := self._usable(name, p.grad)) is not None]
        return [Named(name, p, dense(local_part(g)), share_like(g, share)) for name, p, g, share in usable]

    def _changed(self, piece: Piece, used: Mapping[str, Named], scale: Tensor | None, parts: int) -> Iterator[Piece]:
        """Beside rows of the gradients that are used: what backward passes had left of them."""
        reporter: Any = piece.reporter
        for changes in _changes_of(reporter):
            rows: Tensor | None = None
            with reporter.gate.boundary(), torch.no_grad():
                rows = self.left.rows([used[name] for name in piece.names], piece.rows, scale, parts)
            if rows is not None:
                yield replace(piece, reporter=changes, rows=rows)

    def _gone(self, reporters: Sequence[Reporter], held: Sequence[Held]) -> Iterator[Piece]:
        """Rows of gradients that backward passes had left and of which nothing is used."""
        rows = [(one, row) for one in held if (row := self.left.gone(one.name)) is not None]
        for reporter in reporters if rows else ():
            named = [Named(one.name, one.parameter, row, one.share) for one, row in rows]
            for group in by_device(self._chosen(reporter, named)):
                names, shares = [one.name for one in group], [one.share for one in group]
                for changes in _changes_of(reporter):
                    yield Piece(changes, names, torch.stack([one.tensor for one in group]), shares=shares)

    def before_step(self, optimizer: Optimizer, due: frozenset[Reporter]) -> None:
        """Copy the parameters before the step, when an update is to be measured."""
        self._before, self._stepping = {}, None
        if self._due("updates", due):
            with torch.no_grad():
                self._before = _copies(
                    ((n, local_part(p.detach())) for n, p, _ in self._held(optimizer) if measurable(p)), self._room
                )

    def after_step(self, optimizer: Optimizer, due: frozenset[Reporter]) -> Iterator[Piece]:
        """The step has moved the parameters: rows of those that cannot wait, and of what the optimizer remembers."""
        yield from self._stepped_by(optimizer, due)
        self._stepping = None

    def _stepped_by(self, optimizer: Optimizer, due: frozenset[Reporter]) -> Iterator[Piece]:
        yield from self._states(optimizer, due)
        if not (self._due("parameters", due) or self._due("updates", due)):
            return
        held = self._held(optimizer)
        self._stepped.append((due, held, self._before, _versions(held)))
        self._before = {}
        model = self._model()
        if model is not None and sharding.is_fully_sharded(model):
            yield from self.settle()

    def _states(self, optimizer: Optimizer, due: frozenset[Reporter]) -> Iterator[Piece]:
        wanted = {source: reporters for source in _STATES if (reporters := self._due(source, due))}
        held = self._held(optimizer) if wanted else []
        states = [State(optimizer, one.parameter) for one in held]
        for source, reporters in wanted.items():
            kept = [(*one, state.known[source]) for one, state in zip(held, states, strict=True)]
            told = [(n, p, s, share) for n, p, share, s in kept if not (s is None or is_unreduced(s))]
            found = [Named(name, p, local_part(s.detach()), share_like(s, share)) for name, p, s, share in told]
            yield from self._pieces(reporters, found)
        for name in dict.fromkeys(name for state in states for name in state.unknown()):
            what = f"{name!r} of {type(optimizer).__name__}'s state"
            for reporter in (reporter for reporters in wanted.values() for reporter in reporters):
                reporter.whole.remark(f"{what}: whether it is a momentum or a second moment is not known")

    def settle(self, last: bool = False) -> Iterator[Piece]:
        """Rows of the parameters where they have ended up, and of what steps changed. last: no pass has followed."""
        stepped, self._stepped = self._stepped, []
        for due, held, before, versions in stepped:
            first, moved_since = {one.name for one in held[:1]}, _versions(held) != versions
            if last and moved_since and not first & self._moves:  # an average of weights at the end, say
                for reporter in [*self._due("parameters", due), *self._due("updates", due)][:1]:
                    reporter.whole.remark(_MOVED)
                continue
            self._moves = self._moves if last else (self._moves - first) | (first if moved_since else set())
            now = [Named(name, p, local_part(p.detach()), share) for name, p, share in held if measurable(p)]
            yield from self._pieces(self._due("parameters", due), now)
            moved = [named for named in now if _same_kind(before.get(named.name), named.tensor)]
            updates = self._due("updates", due)
            for reporter in updates:
                copies = before if reporter is updates[-1] else {name: copy.clone() for name, copy in before.items()}
                yield from self._pieces([reporter], moved, copies)
            self._room |= {name: copy for name, copy in before.items() if _reusable(copy)}

    def open(self) -> None:
        """A step begins that may be sampled."""
        self.left.forget()
        self._stepping = None

    def forget(self, due: frozenset[Reporter]) -> None:
        """Give back the memory of the copies, where the coming step measures no update. Costs nothing."""
        if not self._due("updates", due):
            self._room, self._stepping = {}, None

    def _pieces(
        self, reporters: Sequence[Reporter], tensors: Sequence[Named], before: Mapping[str, Tensor] | None = None
    ) -> Iterator[Piece]:
        for reporter in reporters:
            for group in by_device(self._chosen(reporter, tensors)):
                names = [named.name for named in group]
                piece = _measure(reporter, group, [] if before is None else [before[name] for name in names])
                if piece is not None:
                    yield piece

    def _chosen(self, reporter: Reporter, tensors: Sequence[Named]) -> list[Named]:
        """Those that a probe watches; a predicate of the user's that raises switches it off."""
        if reporter.gate.failed:
            return []
        with reporter.gate.boundary():
            return self._wanted(tensors, reporter.probe)
        return []  # the boundary took an exception

    def _due(self, source: str, due: frozenset[Reporter]) -> list[Reporter]:
        return [reporter for reporter in self._of[source] if reporter in due] if due else []

    def _held(self, optimizer: Optimizer) -> list[Held]:
        if self._stepping is None or self._stepping[0] is not optimizer:
            self._stepping = optimizer, list(self._walk(optimizer))
        return self._stepping[1]

    def _walk(self, optimizer: Optimizer) -> Iterator[Held]:
        model = self._model()
        if model is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in named_parameters(model):
            if id(p) in held:
                yield Held(name, p, self._share(model, p))

    def _share(self, model: nn.Module, parameter: nn.Parameter) -> Share:
        if not sharding.is_flattened(parameter):
            return WHOLE if type(parameter) in PLAIN else share_of(parameter)
        if id(parameter) not in self._flat:
            self._flat = sharding.flat_shares(model)
        return self._flat.get(id(parameter), WHOLE)

    def _usable(self, name: str, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or (type(gradient) in PLAIN and measurable(gradient)):
            return gradient
        if not (is_unreduced(gradient) or not (gradient.is_sparse or measurable(gradient))):
            return gradient
        why = "a sum that the optimizer has yet to form over ranks (DTensor Partial)"
        why = why if is_unreduced(gradient) else f"of {gradient.dtype} in layout {gradient.layout}"
        if why not in self._said:
            self._said.add(why)
            _log.warning("the gradient of %s is %s: it and its like are left out, also from totals", name, why)
        return None


def _changes_of(reporter: Reporter) -> list[Reporter]:
    """What reports beside a probe of gradients how they were changed before the step."""
    return [beside for beside in reporter.beside if beside.source == "changes"]


def _measure(reporter: Reporter, group: Sequence[Named], before: Sequence[Tensor]) -> Piece | None:
    gate = reporter.gate
    if gate.failed:
        return None
    with gate.boundary(), torch.no_grad():
        rows = reporter.probe.measure_all([named.tensor for named in group], before)
        return Piece(reporter, [named.name for named in group], rows, shares=[named.share for named in group])
    return None  # the boundary took an exception


def _copies(parameters: Iterable[tuple[str, Tensor]], room: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of parameters, in host memory in the place of the last ones: fresh pages cost more than the copy."""
    copies: dict[str, Tensor] = {}
    fresh: dict[str, Tensor] = {}
    for name, parameter in parameters:
        old = room.pop(name, None)
        fits = old is not None and _same_kind(old, parameter) and old.dtype == parameter.dtype
        if old is not None and fits:
            copies[name] = old.copy_(parameter)
        else:
            fresh[name] = parameter
    return copies | dict(zip(fresh, norms.copies(list(fresh.values())), strict=True))


def _versions(held: Sequence[Held]) -> list[int]:
    return [0 if one.parameter.is_inference() else one.parameter._version for one in held]


def _reusable(copy: Tensor) -> bool:
    """Whether a plain tensor in host memory; a device's allocator has warm memory at hand."""
    return type(copy) is Tensor and copy.is_cpu and not copy.is_inference()


def _same_kind(before: Tensor | None, now: Tensor) -> bool:
    return before is not None and before.shape == now.shape and before.device == now.device
