"""Sums of tensors that a graph of the device adds up in place, where Python runs once and the graph many times.

A CUDA graph is captured once: by the user with `torch.cuda.graph`, or by `mode="reduce-overhead"`. What is captured of
ours are kernels that return at once while a flag beside their sums is 0. Flags are set before the replays of a sampled
step, and taken back after it. The memory is there before a capture begins: what is allocated during one is shared with
what else the graph computes.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece, Share
from torchprobe.capture.compiled.operators import add_all_in_place, add_in_place
from torchprobe.capture.sharding import Named
from torchprobe.probes.base import Reporter
from torchprobe.statistics import fused
from torchprobe.statistics.dtypes import GPUS, reals

_MOST = 4096  # outputs, and gradients of outputs: of 13 kB each
_OPTIMIZERS = 4  # at most, whose steps are captured with a type of parameters each
_kept: list[Tensor] = []  # sums of sessions that are over: graphs that read their flags may outlive them


class Sums:
    """Of one tensor of the program."""

    def __init__(self, reporter: Reporter, lines: Tensor) -> None:
        self.reporter, self.lines = reporter, lines

    def begin(self) -> None:
        """Start anew, with the flag set."""
        self.lines.zero_()
        self.lines[-1, 0].fill_(1.0)

    def end(self) -> None:
        """Nothing is added up any more."""
        self.lines[-1, 0].zero_()


class GradientSums(Sums):
    """Of all gradients of one type that an optimizer uses."""

    def __init__(self, reporter: Reporter, parameters: int, device: torch.device) -> None:
        super().__init__(reporter, fused.lines(device, parameters))
        self.places = torch.zeros(len(self.lines), 3, dtype=torch.int64, device=device)  # zeros: nothing is read
        self.names: Sequence[str] = ()
        self.shares: Sequence[Share] = ()
        self._launch: fused.Launch | None = None
        self._ends: Any = None

    def capture(self, named: Sequence[Named]) -> None:
        """The graph that is captured now will add them up, once it is known on the device where they are."""
        self.names, self.shares = [one.name for one in named], [one.share for one in named]
        tensors = [one.tensor for one in named]
        self._launch = fused.Launch(tensors, fused.LINES, addressed=True)
        add_all_in_place(self.lines, self.places, tensors[0], self._launch.programs, self._launch.span)

    def begin(self) -> None:
        """The same; what was captured is told where gradients are."""
        if self._launch is not None and self._ends is None:
            places, self._ends = self._launch.table()
            self.places[: len(places)].copy_(places)
        super().begin()

    @property
    def known(self) -> bool:
        """Whether replays have been able to find them."""
        return self._ends is not None

    def rows(self) -> tuple[Tensor, Tensor]:
        """The row of each gradient, and how often an optimizer used it."""
        return fused.added(self.lines, self._ends)


class InPlace:
    """The sums of a session."""

    def __init__(self, gradients: Sequence[Reporter]) -> None:
        """gradients: the reporters of those that optimizers use."""
        self._reporters = gradients
        self._prepared = False
        self._outputs: dict[tuple[Reporter, str], Sums] = {}
        self._gradients: list[GradientSums] = []
        self._number = 0  # of the step that is added up
        self._due: frozenset[Reporter] = frozenset()
        self._ready: dict[int, tuple[int, list[Piece]]] = {}  # of steps that are over: the passes, and rows
        self.ready = False
        """Whether there is memory for it."""
        self.used: set[Sums] = set()
        """Those that a graph adds to."""
        self._passes = 0

    def lines(self, reporter: Reporter, name: str, device: torch.device) -> Tensor | None:
        """Where a module's output is added up, by a graph that is traced; None where its sums cannot be had so."""
        sums = self._outputs.get((reporter, name))
        if sums is None or sums.lines.device != device or reporter.gate.failed:
            return None
        if sums not in self.used and reporter in self._due:
            sums.begin()
        self.used.add(sums)
        return sums.lines

    def add(self, reporter: Reporter, name: str, tensor: Tensor) -> None:
        """Have the graph that is captured now add up a module's output."""
        sums = self._outputs.get((reporter, name))
        if sums is not None and sums.lines.device == tensor.device:
            tensor = reals([tensor.detach()])[0]
            if fused.applies_to(tensor):
                add_in_place(sums.lines, tensor)
                self.used.add(sums)

    def add_gradients(self, reporter: Reporter, named: Sequence[Named]) -> None:
        """Have the graph that is captured now add up the gradients that an optimizer uses."""
        groups: defaultdict[torch.dtype, list[Named]] = defaultdict(list)
        for one in named:
            if fused.applies_to(one.tensor):
                groups[one.tensor.dtype].append(one)
        for group in groups.values():
            sums = next((one for one in self._gradients if one.reporter is reporter and one not in self.used), None)
            if sums is not None and {one.tensor.device for one in group} == {sums.lines.device}:
                sums.capture(group)
                self.used.add(sums)

    def saw_pass(self) -> None:
        """A training pass runs in Python: where more run than count, the rows are of others' too."""
        self._passes += 1

    def open(
        self, number: int, due: frozenset[Reporter], model: nn.Module | None, outputs: Iterable[tuple[Reporter, str]]
    ) -> None:
        """A step is about to begin. Small kernels before and after one that is sampled, nothing otherwise.

        model: in which hooks are on, on these outputs.
        """
        if model is not None and not self._prepared:
            self._prepare(model, outputs)
        if self.used and self._due and number != self._number:
            self._ready = {self._number: (self._passes, list(self._finish()))}
        if not self.used or (number == self._number and due == self._due):
            self._number, self._due = number, due
            return
        for sums in self._all(self._due - due):
            sums.end()
        self._number, self._due, self._passes = number, due, 0
        for sums in self._all(due):
            sums.begin()

    def take(
        self, number: int, passes: int, scale: float | Tensor | None, scaled: Callable[[], bool]
    ) -> Iterable[Piece]:
        """The rows of a step that ends, or is to be written as far as it goes.

        passes: of it that count. scale: what the loss was multiplied with. scaled: whether it may have been.
        """
        if number != self._number or not self._due:
            ran, pieces = self._ready.pop(number, (0, []))
        else:
            ran, pieces = self._passes, list(self._finish())
            for sums in self._all(self._due):
                sums.begin()
        if ran > passes:
            return ()
        if pieces and scale is None and scaled():  # by how much is not known
            return [piece for piece in pieces if getattr(piece.reporter, "source", "") != "output_gradients"]
        return pieces if scale is None else [piece.unscaled(scale) for piece in pieces]

    def detach(self) -> None:
        """Graphs that live on add nothing up any more."""
        for sums in self.used:
            sums.end()
            _kept.append(sums.lines)
        self._outputs, self._gradients, self.used, self.ready = {}, [], set(), False

    def _prepare(self, model: nn.Module, outputs: Iterable[tuple[Reporter, str]]) -> None:
        """Make the memory, once, on the model's device."""
        device = next((parameter.device for parameter in model.parameters()), torch.device("meta"))
        self._prepared = True
        self.ready = device.type in GPUS and fused.usable(device.type)
        if self.ready:
            some = itertools.islice((one for one in outputs if _columns(one[0])), _MOST)
            self._outputs = {(reporter, name): Sums(reporter, fused.lines(device)) for reporter, name in some}
            many = [reporter for reporter in self._reporters if _columns(reporter)] * _OPTIMIZERS
            self._gradients = [GradientSums(one, len(list(model.parameters())), device) for one in many]

    def _all(self, due: frozenset[Reporter]) -> list[Sums]:
        return [one for one in self.used if one.reporter in due]

    def _finish(self) -> Iterator[Piece]:
        groups: defaultdict[Reporter, dict[str, Tensor]] = defaultdict(dict)
        for (reporter, name), sums in self._outputs.items():
            if sums in self.used and reporter in self._due and not reporter.gate.failed:
                groups[reporter][name] = sums.lines
        for reporter, lines in groups.items():
            yield _piece(reporter, list(lines), *fused.all_added(list(lines.values())))
        for one in self._gradients:
            if one.known and one.reporter in self._due and not one.reporter.gate.failed:
                rows, calls = one.rows()
                yield _piece(one.reporter, one.names, rows, calls * (calls == 1), one.shares)  # of two steps: of none


def _piece(
    reporter: Reporter, names: Sequence[str], rows: Tensor, calls: Tensor, shares: Sequence[Share] | None = None
) -> Piece:
    columns = [rows[:, column] for column in _columns(reporter) or ()]
    return Piece(reporter, names, torch.stack((*columns, calls), dim=1), counted=True, shares=shares)


def _columns(reporter: Reporter) -> tuple[int, ...] | None:
    """Which of `fused.rows` are a probe's fields, if it says so itself: a subclass of it may compute what it likes."""
    return type(reporter.probe).__dict__.get("columns")
