"""Attention as a source: watched during one forward pass of the model at a time, and taken when the pass has ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.attention import sites, stack
from torchprobe.capture.attention.mode import AttentionMode
from torchprobe.capture.attention.multi_head import FastPaths, has_any
from torchprobe.capture.attention.observer import SECOND_THREAD, Observer
from torchprobe.capture.attention.padding import MaskArguments
from torchprobe.capture.attention.sites import Reading, Readings
from torchprobe.capture.attention.traced import TracedAttention
from torchprobe.capture.attention.unread import GraphLook
from torchprobe.capture.compat import in_backward, under_transform
from torchprobe.capture.compiled.graphs import in_compiled_call
from torchprobe.capture.source import Pass, Running
from torchprobe.naming import Modules, all_modules
from torchprobe.probes.attention import Attention, AttentionMap, AttentionReporter
from torchprobe.probes.base import Reporter
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

    def __init__(self, model: ReferenceType[nn.Module], reporter: Reporter, running: Running) -> None:
        self.reporter = cast("AttentionReporter", reporter)
        probe = cast("Attention", reporter.probe)
        self._model = model
        self._running = running
        self._maps = _Maps(self.reporter, probe)
        self._observer = Observer(model, reporter.gate, probe.rows, self._maps.drawn)
        self._mode = AttentionMode(self._observer)
        self.masks = MaskArguments(reporter, self._mode.handwritten.say_padded)
        self._fast_paths = FastPaths(self._mode, self._observer.uncovered)
        self._traced = TracedAttention(self._observer, running, probe.compiled == "read")
        self._look = GraphLook(model, self._observer, running)
        self._entered = False

    @property
    def uncovered(self) -> Mapping[str, int]:
        """How often attention was not recorded, by reason."""
        return self._observer.uncovered

    def open(self, step: int, due: frozenset[Reporter]) -> None:
        """A step is about to begin: whether it gives maps."""
        self._maps.open(step, self.reporter in due)

    def arm(self, due: bool, modules: Modules) -> None:
        """A step begins; due: whether any probe samples it, for a compiled graph is for all of them.

        Graphs that are compiled from now on record, or do not.
        """
        self._look.attach()
        if due and not stack.MISSING:
            self._traced.arm(modules)
        else:
            self._traced.disarm()

    def detach(self) -> None:
        """Take everything off the model."""
        self.leave()
        self._look.detach()
        self._traced.detach()

    # ---- a forward pass

    def enter(self, passing: Pass, module: nn.Module) -> None:
        """A forward pass begins; module: what is called, the model or a part of it.

        Does nothing while something traces, or recomputes, the pass, nor for a module that is compiled as a whole; a
        pass that cannot be recorded is counted.
        """
        due, running, gate = self.reporter in passing.due, self._running, self.reporter.gate
        # Graphs that were compiled with our mode on the stack are to find it there, though nothing is recorded.
        followed = due or (running.compiled and (running.sampled if passing.training else running.sampled_val))
        if not followed or gate.failed:
            return
        if torch.compiler.is_compiling() or under_transform() or in_backward():
            return
        with gate.boundary():
            model = self._model()
            modules = [] if model is None else [module for _, module in all_modules(model)]
            if model is None or not self._may_enter(modules):
                return
            self._begin(due)
            if running.compiled and has_any(model):  # hooks on its modules would have its graphs compiled anew
                self._observer.uncovered.add("fused paths in evaluation, beside compiled graphs")
            elif not in_compiled_call():
                self._mode.handwritten.begin(modules)
                stack.push_mode(self._mode)
                self._fast_paths.begin_pass(model, module, modules)

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

    def _may_enter(self, modules: Iterable[nn.Module]) -> bool:
        uncovered, reason = self._observer.uncovered, None
        if stack.MISSING:
            reason = f"this version of torch, which has no {stack.MISSING}"
        elif self._observer.sites.are_elsewhere:
            reason = SECOND_THREAD
        elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            reason = "passes that are captured into a CUDA graph"
        elif any(isinstance(module, torch.jit.ScriptModule) for module in modules):
            uncovered.add("parts of the model that torch.jit has compiled")  # the others are
        if reason is not None:
            uncovered.add(reason)
        return reason is None

    def _begin(self, due: bool) -> None:
        self.leave()  # a pass that was interrupted did not
        self.take()
        self._entered = True
        self._observer.begin_pass(off=not due)

    # ---- what passes make of a step

    merge = staticmethod(merged)

    def rows(self, taken: Taken, training: bool, due: frozenset[Reporter]) -> list[Piece]:
        """The rows of passes, a row for each head of each attention; and its maps, when they are due."""
        if self.reporter not in due:
            return []
        prefix, rows = "" if training else "val/", []
        reporters = (self.reporter, self.reporter.heat_maps)[: 1 + taken.maps]
        for name, reading in self._observer.sites.named(taken.readings):
            sampled = reading.rows.new_full((len(reading.rows), 1), float(reading.sampled))
            names, heads = [name] * len(reading.rows), torch.cat((reading.rows, sampled), 1)
            rows += [Piece(reporter, names, heads, prefix) for reporter in reporters]
            if reading.kept is not None:
                rows.append(self._maps.row_of(name, reading, reading.kept, prefix))
        return rows

    def saw_nothing(self, training: bool) -> None:
        """A step that was to be sampled has no attention: where the model is compiled, that is why."""
        if self._running.compiled and not (self._look.free or (training and self._look.said)):
            self._observer.uncovered.add("compiled graphs" if training else "evaluation in compiled graphs")


class _Maps:
    """Pictures of attention: in which steps, and of which modules."""

    def __init__(self, reporter: AttentionReporter, probe: Attention) -> None:
        self.due = False
        self._reporter = reporter
        self._probe = probe
        self._sampled = 0
        self._modules: set[str] = set()
        self._reporters: dict[tuple[str, int, int], AttentionMap] = {}

    def open(self, step: int, sampled: bool) -> None:
        """A step is about to begin."""
        schedule, regular = self._probe.map_schedule, self._reporter.is_regular(step)
        by_number = self._sampled % _SAMPLES_A_MAP == 0 and (regular or not sampled)
        self.due = by_number if schedule is None else schedule(step)
        self._sampled += sampled and regular

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
