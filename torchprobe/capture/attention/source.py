"""Attention as a source: watched during one forward pass of the model at a time, and taken when the pass has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.attention import sites, stack
from torchprobe.capture.attention.mode import AttentionMode
from torchprobe.capture.attention.multi_head import FastPaths
from torchprobe.capture.attention.observer import SECOND_THREAD, Observer
from torchprobe.capture.attention.sites import Reading, Readings
from torchprobe.capture.attention.traced import TracedAttention
from torchprobe.capture.gate import Gate
from torchprobe.capture.graphs import in_compiled_call
from torchprobe.capture.recompute import in_backward, under_transform
from torchprobe.capture.sites import Pass
from torchprobe.probes.attention import Attention, AttentionHeatMaps, AttentionMap
from torchprobe.statistics.attention import Source, attention_map

_SAMPLES_A_MAP = 10  # sampled steps


class Taken(NamedTuple):
    """What a forward pass has recorded, or several merged: statistics alone, nothing of the user's.

    maps: whether a picture of its heads is due.
    """

    readings: Readings
    maps: bool


def merged(a: Taken, b: Taken) -> Taken:
    """Two passes as one, a before b: as large as a single pass of both."""
    return Taken(sites.merged(a.readings, b.readings), a.maps or b.maps)


class AttentionSource:
    """Statistics of every attention in a forward pass of a model, each under the name of the module that owns it.

    Between `enter` and `leave` a `TorchFunctionMode` is on the stack; otherwise there is nothing anywhere. After each
    pass its caller takes what it recorded, and decides when, and whether, it becomes rows.
    """

    def __init__(self, model: ReferenceType[nn.Module], probe: Attention, gate: Gate, current: Pass) -> None:
        self.probe = probe
        self.gate = gate
        self.heat_maps = AttentionHeatMaps(probe)
        self._model = model
        self._current = current
        self._maps = _Maps(probe)
        self._observer = Observer(model, gate, probe.rows, self._maps.drawn)
        self._mode = AttentionMode(self._observer)
        self._fast_paths = FastPaths(self._mode, self._observer.uncovered)
        self._traced = TracedAttention(model, self._observer, current)
        self._entered = False
        self._kept: dict[bool, Taken] = {}  # for `collect`
        self._training = True

    @property
    def uncovered(self) -> Mapping[str, int]:
        """How often attention was not recorded, by reason."""
        return self._observer.uncovered

    def open_for(self, step: int) -> None:
        """A step begins: whether it gives maps."""
        self._maps.open_for(step, self.gate.train)

    def arm(self, due: bool) -> None:
        """A step begins; due: whether any probe samples it, for a compiled graph is for all of them.

        Graphs that are compiled from now on record, or do not.
        """
        if due and not stack.MISSING:
            self._traced.arm()
        else:
            self._traced.disarm()

    def detach(self) -> None:
        """Take everything off the model."""
        self.leave()
        self._traced.detach()

    # ---- a forward pass

    def enter(self, module: nn.Module, training: bool = True, grad_enabled: bool | None = None) -> None:
        """A forward pass begins, as training or as validation.

        module: what is called, the model or a part of it. grad_enabled: whether the pass runs with gradients, if
        that is not so where this is called. Does nothing while something traces, or recomputes, the pass, nor for
        a module that is compiled as a whole; a pass that cannot be recorded is counted.
        """
        due, current = self.gate.train if training else self.gate.val, self._current
        # Graphs that were compiled with our mode on the stack are to find it there, though nothing is recorded.
        followed = due or (current.compiled and (current.sampled if training else current.sampled_val))
        if not followed or self.gate.failed:
            return
        if torch.compiler.is_compiling() or under_transform() or in_backward():
            return
        with self.gate.boundary():
            model = self._model()
            if model is None or not self._may_enter(model):
                return
            self._begin(training, due)
            if not in_compiled_call():
                stack.push_mode(self._mode)
                with_gradients = torch.is_grad_enabled() if grad_enabled is None else grad_enabled
                self._fast_paths.begin_pass(model, module, with_gradients)

    def leave(self) -> None:
        """The pass has ended, with or without an exception. Safe to call at any time; costs nothing after the first."""
        if not self._entered or self._observer.sites.are_elsewhere:
            return
        self._entered = False
        stack.remove(self._mode)
        self._fast_paths.end_pass()
        self._mode.forget()
        self._traced.interrupted()

    def take(self) -> Taken | None:
        """What this thread's pass has recorded, which is over: its caller owns it. None when it is nothing.

        Compiled graphs record while they run, also where no pass was seen to begin.
        """
        readings = self._observer.sites.take()
        return None if readings is None else Taken(readings, self._maps.due)

    def _may_enter(self, model: nn.Module) -> bool:
        uncovered, reason = self._observer.uncovered, None
        if stack.MISSING:
            reason = f"this version of torch, which has no {stack.MISSING}"
        elif self._observer.sites.are_elsewhere:
            reason = SECOND_THREAD
        elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            reason = "passes that are captured into a CUDA graph"
        elif any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            uncovered.add("parts of the model that torch.jit has compiled")  # the others are
        if reason is not None:
            uncovered.add(reason)
        return reason is None

    def _begin(self, training: bool, due: bool) -> None:
        self.leave()  # a pass that was interrupted did not
        self._keep()
        self._training, self._entered = training, True
        self._observer.begin_pass(off=not due)

    # ---- what passes make of a step

    def rows_of(self, taken: Sequence[Taken], training: bool) -> list[Piece]:
        """The rows of some passes, a row for each head of each attention; and its maps, when they are due.

        An empty sequence, of a step that was to be sampled, is explained where the model is compiled.
        """
        if not taken:
            if self._current.compiled and (self.gate.train if training else self.gate.val):
                self._observer.uncovered.add("compiled graphs" if training else "evaluation in compiled graphs")
            return []
        readings, maps = reduce(merged, taken)
        prefix, rows = "" if training else "val/", []
        for name, reading in self._observer.sites.named(readings):
            sampled = reading.rows.new_full((len(reading.rows), 1), float(reading.sampled))
            names, heads = [name] * len(reading.rows), torch.cat((reading.rows, sampled), 1)
            rows += [Piece(reporter, names, heads, prefix) for reporter in (self.probe, self.heat_maps)[: 1 + maps]]
            if reading.kept is not None:
                rows.append(self._maps.row_of(name, reading, reading.kept, prefix))
        return rows

    def collect(self, training: bool) -> list[Piece]:
        """For a caller that does not take: rows of all training, or validation, passes since the last call."""
        self._keep()
        self._training = True
        kept = self._kept.pop(training, None)
        return self.rows_of([] if kept is None else [kept], training)

    def _keep(self) -> None:
        taken, before = self.take(), self._kept.get(self._training)
        if taken is not None:
            self._kept[self._training] = taken if before is None else merged(before, taken)


class _Maps:
    """Pictures of attention: in which steps, and of which modules."""

    def __init__(self, probe: Attention) -> None:
        self.due = False
        self._probe = probe
        self._sampled = 0
        self._modules: set[str] = set()
        self._reporters: dict[tuple[str, int, int], AttentionMap] = {}

    def open_for(self, step: int, sampled: bool) -> None:
        """A step begins."""
        schedule = self._probe.map_schedule
        self.due = self._sampled % _SAMPLES_A_MAP == 0 if schedule is None else schedule(step)
        self._sampled += sampled

    def drawn(self, module: str, source: Source, generator: torch.Generator) -> Tensor | None:
        """The map of a call, (heads, height, width), if it is due."""
        if not self.due or (module not in self._modules and len(self._modules) >= self._probe.map_layers):
            return None
        drawn = attention_map(source, generator=generator)
        self._modules.add(module)
        return drawn

    def row_of(self, name: str, reading: Reading, drawn: Tensor, prefix: str) -> Piece:
        """A map as rows, one a head."""
        key = (name, drawn.size(1), drawn.size(2))
        reporter = self._reporters.setdefault(key, AttentionMap(*key))
        return Piece(reporter, [name] * len(drawn), drawn.flatten(1).to(reading.rows.dtype), prefix)
