"""Models whose predictions are judged and whose uncertainty is read: their training, alone or on a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import torchprobe
from tests.distributed import training as t
from torchprobe.testing import MemoryWriter

Wrap = Callable[[nn.Module], nn.Module]


class Ensemble(nn.Module):
    """Three classifiers of five classes, and the mean of their logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.members = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


class Gaussian(nn.Module):
    """A mean and a variance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.spread = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": self.mean(x), "variance": self.spread(x).exp()}


def inputs(step: int) -> Tensor:
    return torch.randn(96, 4, generator=torch.Generator().manual_seed(step))


def classify(rows: slice, wrap: Wrap = lambda m: m, log_predictions: bool = False) -> Any:
    """Every probe there is, in three steps with a validation pass of two batches after each."""
    writer, judge = MemoryWriter(), nn.CrossEntropyLoss()
    model = wrap(Ensemble())
    optimizer = t.sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=2) as session:
        for k in range(t.STEPS):
            x = inputs(k)[rows]
            logits = model(x)
            if log_predictions:
                session.log_predictions(logits.softmax(-1), _classes(x))
            torch.nn.functional.cross_entropy(logits, _classes(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                for seed in (100 + k, 200 + k):
                    x = inputs(seed)[rows]
                    judge(model(x), _classes(x))
            model.train()
    return t.values(writer)


def regress(rows: slice, wrap: Wrap = lambda m: m) -> Any:
    """A regression that says how sure it is."""
    writer, judge = MemoryWriter(), nn.GaussianNLLLoss()
    model = wrap(Gaussian())
    optimizer = t.sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=2):
        for k in range(t.STEPS):
            x = inputs(k)[rows]
            out = model(x)
            judge(out["mean"], x.sum(1, keepdim=True), out["variance"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return t.values(writer)


def settle(rows: slice, wrap: Wrap = lambda m: m, classes: bool = True) -> dict[str, Any]:
    """Training, by a cross-entropy or a squared error, that drains after each step.

    Its values, what it says that it missed, and in which forms the output of each step was judged.
    """
    writer = MemoryWriter()
    model = wrap(Ensemble())
    optimizer, judged = t.sgd(model), []
    probes = [torchprobe.Uncertainty(every=1), torchprobe.Calibration(every=1)]
    with torchprobe.instrument(model, writer=writer, probes=probes, flush_every=1) as session:
        source, phases = session._recorder._sources.predictions, []
        take = source.take
        source.take = lambda: phases.append(take()) or phases[-1]
        for k in range(2 * t.STEPS):
            x = inputs(k)[rows]
            logits = model(x)
            judged.append([form.key for form in phases[-1].waiting[-1].predicted])
            loss = nn.functional.cross_entropy(logits, _classes(x)) if classes else (logits - x[:, :1]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.flush(30)
    found = [item for record in writer.records for item in record.values.items()]
    missed = [str(value) for tag, value in found if tag.startswith("nothing_captured/")]
    return {"judged": judged, "values": t.values(writer), "missed": missed}


def split(rank: int, at: int) -> slice:
    """The rows of one of two ranks."""
    return slice(0, at) if rank == 0 else slice(at, None)


def tags_of(found: Any, prefixes: Sequence[str]) -> dict[str, Any]:
    return {tag: steps for tag, steps in found.items() if tag.removeprefix("val/").startswith(tuple(prefixes))}


def _classes(x: Tensor) -> Tensor:
    return (x.sum(1).abs() * 2).long().clamp(max=4)
