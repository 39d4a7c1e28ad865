"""Runs a model's forward pass with attention recorded, and what every such pass has to leave as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.buffer.step import Piece
from torchprobe.capture.attention.source import AttentionSource, Taken, merged
from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.in_place import InPlace
from torchprobe.capture.source import TRAINING, VALIDATION, Dropped, Pass, Running
from torchprobe.probes.schedule import every
from torchprobe.statistics.attention import summarise


@dataclass
class Recorded:
    output: Any
    heads: dict[str, list[dict[str, float]]]
    """By site, what is known of each head."""
    sampled: dict[str, bool]
    kept: dict[str, Tensor | None]
    uncovered: dict[str, int]

    def of(self, field: str, site: str = "root") -> list[float]:
        return [head[field] for head in self.heads[site]]


class Source(AttentionSource):
    """A source by itself: it is told of passes, and its rows are asked for, by hand."""

    @property
    def gate(self) -> Gate:
        return self.reporter.gate

    def enter(self, module: nn.Module, training: bool = True, grad_enabled: bool | None = None) -> None:
        due = frozenset([self.reporter] if (self.gate.train if training else self.gate.val) else [])
        passing = Pass(TRAINING if training else VALIDATION, due, lambda: None, Dropped())
        with nullcontext() if grad_enabled is None else torch.set_grad_enabled(grad_enabled):
            super().enter(passing, module)

    def rows_of(self, taken: Sequence[Taken], training: bool) -> list[Piece]:
        due = frozenset([self.reporter])
        return self.rows(reduce(self.merge, taken), training, due) if taken else []


def source_of(model: nn.Module, rows: Any = "all", maps: bool = False) -> Source:
    """A source whose probe is due."""
    gate = Gate("Attention", Meter())
    reporter = torchprobe.Attention(rows=rows, maps_every=1 if maps else 2).reporter()
    reporter.begin(gate, every(1))
    gate.train = gate.val = True
    source = Source(ref(model), reporter, Running(Meter(), InPlace([])))
    source.open(3, frozenset([reporter]))
    return source


class Capture:
    """A source of which every pass is taken when it ends, as a session does, and counts."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.passes: list[Taken] = []
        self.enter = source.enter

    @property
    def uncovered(self) -> Mapping[str, int]:
        return self.source.uncovered

    def leave(self) -> None:
        self.source.leave()
        taken = self.source.take()
        if taken is not None:
            self.passes.append(taken)


def capture_of(model: nn.Module, rows: Any = "all", maps: bool = False) -> Capture:
    return Capture(source_of(model, rows, maps))


@contextmanager
def hooked(model: nn.Module, capture: Capture | Source, training: bool = True):
    """The root hooks, as a session puts them on."""

    def enter(module, args):
        if not torch.compiler.is_compiling():
            capture.enter(module, training)

    def leave(module, args, output):
        if not torch.compiler.is_compiling():
            capture.leave()

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def record(model: nn.Module, *args: Any, rows: Any = "all", maps: bool = False, **kwargs: Any) -> Recorded:
    """One recorded training pass."""
    capture = capture_of(model, rows, maps)
    depth = torch._C._len_torch_function_stack()
    with hooked(model, capture):
        output = model(*args, **kwargs)
    assert torch._C._len_torch_function_stack() == depth
    assert not capture.source.gate.failed
    return recorded(capture, output)


def recorded(capture: Capture, output: Any = None) -> Recorded:
    """What the passes since the last call add up to."""
    passes, capture.passes = capture.passes, []
    found = capture.source._observer.sites.named(reduce(merged, passes).readings) if passes else []
    return Recorded(
        output,
        {name: [summarise(row) for row in reading.rows.tolist()] for name, reading in found},
        {name: reading.sampled for name, reading in found},
        {name: reading.kept for name, reading in found},
        dict(capture.uncovered),
    )


def train_once(model: nn.Module, *args: Any, probed: bool, **kwargs: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Outputs, gradients and random state of a forward and backward pass."""
    model = copy.deepcopy(model)
    torch.manual_seed(5)
    output = record(model, *args, **kwargs).output if probed else model(*args, **kwargs)
    outputs = [o for o in (output if isinstance(output, tuple) else (output,)) if isinstance(o, Tensor)]
    sum(o.double().square().sum() for o in outputs if o.requires_grad).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [o.detach() for o in outputs], gradients, torch.get_rng_state()


def assert_untouched(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs, gradients and random numbers are bitwise those of a pass that is not recorded."""
    bare = train_once(model, *args, probed=False, **kwargs)
    seen = train_once(model, *args, probed=True, **kwargs)
    for expected, found in zip(bare[:2], seen[:2], strict=True):
        assert len(expected) == len(found) > 0
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(bare[2], seen[2])
