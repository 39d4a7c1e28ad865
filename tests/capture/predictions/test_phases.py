"""Rows belong to the training pass that gave them: who takes them decides whether they count."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.probes.calibrated import batch, net
from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.predictions.source import PredictionSource
from torchprobe.capture.source import TRAINING, Dropped, Pass
from torchprobe.probes.evidence import added_up
from torchprobe.probes.schedule import every
from torchprobe.statistics import calibration


class Watched:
    """A model, and the source that reads its training passes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reporters = [torchprobe.Uncertainty().reporter(), torchprobe.Calibration().reporter()]
        for reporter in self.reporters:
            reporter.begin(Gate(reporter.name, Meter()), every(1))
        self.due = frozenset(self.reporters)
        self.source = PredictionSource(weakref.ref(model), self.reporters, Meter())
        self.source.open(1, self.due)

    def run(self, x):
        self.source.enter(Pass(TRAINING, self.due, lambda: None, Dropped()))
        out = self.model(x)
        self.source.leave()
        self.source.on_output(self.model, (x,), {}, out)
        return out, self.source.take()

    def rows(self, *phases):
        """Rows by name, of uncertainty and of calibration."""
        pieces = self.source.rows(list(phases), True, self.due)
        found = {reporter: ([], []) for reporter in self.reporters}
        for piece in pieces:
            if piece.reporter in found:
                found[piece.reporter][0].extend(piece.names)
                found[piece.reporter][1].extend(piece.rows.numpy())
        return [added_up(names, rows) for names, rows in found.values()]

    def counts(self, *phases):
        judged = self.rows(*phases)[1]
        return [row[calibration.FIELDS.index("count")] for name, row in judged.items() if name.startswith("softmax-1")]


def seen(watched, seed, size=32):
    x, y = batch(seed, size)
    out, phase = watched.run(x)
    F.cross_entropy(out, y).backward()
    return phase


def test_only_passes_that_are_asked_for_count():
    watched = Watched(net())
    kept, dropped, other = seen(watched, 0, 20), seen(watched, 1, 30), seen(watched, 2, 40)
    assert len({id(phase) for phase in (kept, dropped, other)}) == 3
    assert sum(watched.counts(kept, other, kept)) == 60
    assert watched.counts(kept, other) == []


def test_gradients_that_arrive_later_count():
    watched = Watched(net())
    passes = [(*watched.run(batch(seed)[0]), batch(seed)[1]) for seed in range(3)]
    for out, _, y in passes:
        F.cross_entropy(out, y).backward()
    assert sum(watched.counts(*[phase for _, phase, _ in passes])) == 96


def test_a_pass_over_the_same_input_goes_on_in_the_same_phase():
    watched = Watched(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 5)))
    x, y = batch(0)
    outs, phases = zip(*[watched.run(x) for _ in range(4)], strict=True)
    assert all(phase is phases[0] for phase in phases)
    sum(F.cross_entropy(out, y) for out in outs).backward()
    assert watched.run(batch(1)[0])[1] is not phases[0]
    assert sum(watched.counts(*phases)) == 4 * 32


def test_thousands_of_micro_batches_become_one():
    watched = Watched(net())
    total = [seen(watched, 0)]
    for seed in range(1, 30):
        total = watched.source.merge(total, [seen(watched, seed)])
    assert len(total) <= 16
    alone = Watched(watched.model)
    phases = [seen(alone, seed) for seed in range(30)]
    merged, apart = watched.rows(*total), alone.rows(*phases)
    assert all(len(phase.waiting) == 0 for phase in total)
    for a, b in zip(merged, apart, strict=True):
        assert a.keys() == b.keys() != set()
        assert all(torch.allclose(torch.tensor(a[name]), torch.tensor(b[name])) for name in a)


def test_a_pass_that_is_dropped_leaves_nothing_without_the_garbage_collector():
    watched = Watched(net())
    watched.run(batch(0)[0])
    gc.collect()
    gc.disable()
    try:
        gone = []
        for seed in range(50):
            out, phase = watched.run(batch(seed)[0])
            gone += [weakref.ref(out), weakref.ref(phase)]
            del out, phase
        assert not any(ref() is not None for ref in gone)
    finally:
        gc.enable()


def test_a_phase_that_is_kept_keeps_no_output_and_no_graph():
    class Held:
        def __call__(self, gradient):
            pass

    watched, held = Watched(net()), Held()
    out, phase = watched.run(batch(0)[0])
    out.grad_fn.register_prehook(held)  # a node itself takes no weak reference
    gone = weakref.ref(out), weakref.ref(held)
    del out, held
    assert phase is not None
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("gives", ["the parameter", "a distribution of parameters"])
def test_no_hook_stays_on_a_parameter_that_a_model_returns(gives):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.spread = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.rand(8, 4) + 1)

        def forward(self, x):
            return self.mean if gives == "the parameter" else torch.distributions.Normal(self.mean, self.spread)

    watched = Watched(Table())
    for seed in range(3):
        watched.run(batch(seed)[0])
    assert not any(p._backward_hooks for p in watched.model.parameters())
