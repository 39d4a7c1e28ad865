"""Attention of a step as rows for the buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.attention.capture import AttentionCapture
from torchprobe.capture.attention.sites import Found
from torchprobe.capture.gate import Gate
from torchprobe.capture.sites import Pass
from torchprobe.probes.attention import Attention, AttentionMap, AttentionReporter
from torchprobe.probes.base import Reporter
from torchprobe.statistics.attention import Source, attention_map

_SAMPLES_A_MAP = 10  # sampled steps


class AttentionPieces:
    """An attention probe on a model: follows passes while its gate is open, and keeps a map when one is due."""

    def __init__(self, model: ReferenceType[nn.Module], reporter: Reporter, current: Pass) -> None:
        self.reporter = cast("AttentionReporter", reporter)
        self.probe = probe = cast("Attention", reporter.probe)
        self.gate = gate = cast("Gate", reporter.gate)
        self._capture = AttentionCapture(model, gate, probe.rows, self._map_of, current)
        self._current = current
        self._map_due = False
        self._sampled = 0
        self._mapped: set[str] = set()
        self._reporters: dict[tuple[str, int, int], AttentionMap] = {}

    @property
    def uncovered(self) -> Mapping[str, int]:
        """How often attention was not recorded, by reason."""
        return self._capture.uncovered

    def open_for(self, step: int) -> None:
        """A step begins: whether it gives maps."""
        schedule, sampled = self.probe.map_schedule, self.gate.train
        regular = self.reporter.is_regular(step)
        by_number = self._sampled % _SAMPLES_A_MAP == 0 and (regular or not sampled)
        self._map_due = by_number if schedule is None else schedule(step)
        self._sampled += sampled and regular

    def arm(self, due: bool) -> None:
        """A step begins; due: whether any probe samples it, for a compiled graph is for all of them."""
        if due:
            self._capture.arm()
        else:
            self._capture.disarm()

    def detach(self) -> None:
        """Take everything off the model."""
        self._capture.detach()

    def enter(self, module: nn.Module, training: bool) -> None:
        """A forward pass begins."""
        due, current = self.gate.train if training else self.gate.val, self._current
        if due or (current.compiled and (current.sampled if training else current.sampled_val)):
            self._capture.enter(module, training, off=not due)

    def leave(self) -> None:
        """A forward pass has ended, also by an exception."""
        self._capture.leave()

    def collect(self, training: bool) -> Iterator[Piece]:
        """A piece for each attention: a row a head; and its map, when there is one."""
        prefix = "" if training else "val/"
        everything = self._capture.collect(training)
        if self._current.compiled and not everything and (self.gate.train if training else self.gate.val):
            self._capture.note_uncovered("compiled graphs" if training else "evaluation in compiled graphs")
        for found in everything:
            sampled = found.rows.new_full((len(found.rows), 1), float(found.sampled))
            names, rows = [found.name] * len(found.rows), torch.cat((found.rows, sampled), 1)
            yield Piece(self.reporter, names, rows, prefix)
            if self._map_due:
                yield Piece(self.reporter.heat_maps, names, rows, prefix)
            if found.kept is not None:
                yield self._map_piece(found, found.kept, prefix)

    def _map_of(self, name: str, source: Source, generator: torch.Generator) -> Tensor | None:
        if not self._map_due or (name not in self._mapped and len(self._mapped) >= self.probe.map_layers):
            return None
        drawn = attention_map(source, generator=generator)
        self._mapped.add(name)
        return drawn

    def _map_piece(self, found: Found, drawn: Tensor, prefix: str) -> Piece:
        key = (found.name, drawn.size(1), drawn.size(2))
        reporter = self._reporters.setdefault(key, AttentionMap(*key))
        return Piece(reporter, [found.name] * len(drawn), drawn.flatten(1).to(found.rows.dtype), prefix)
