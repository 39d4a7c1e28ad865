"""A long run: memory, files and numbers after many steps are what they are after a few.

SOAK_STEPS=200000 pytest tests/test_soak.py -s -n 0        # the long form, which prints its figures
"""

from __future__ import annotations

import gc
import os
import statistics
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from torch import Tensor, nn

import torchprobe
from tests.setups.reference import gradients, l2, moments, parameters
from torchprobe.probes.choosing import default_probes
from torchprobe.reports.run import Run, read_run
from torchprobe.writers.tfrecord import records_of

STEPS = int(os.environ.get("SOAK_STEPS", "900"))
EVERY = 30 if STEPS < 10_000 else 100
PARTS = 3 if STEPS < 10_000 else 5  # in each of which as many pictures are made: one in ten samples
BETWEEN = 15  # steps before the end of a part, where nothing is sampled, so that all parts hold as many samples
SCALAR, EVENT = 9, 34  # bytes beside a tag's own, and around all of a step, in docs/guides/how_it_works.md


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.act, self.head = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc(x))
        return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0].mean(1))


@dataclass
class Soak:
    """A run: what its folder holds, what its last step was, and what stood where after each part of it."""

    folder: Path
    last: dict[str, float] = field(default_factory=dict)
    marks: list[dict[str, int]] = field(default_factory=list)

    def growth(self, what: str) -> list[int]:
        """By part but the first, in which everything is made."""
        values = [mark[what] for mark in self.marks]
        return [after - before for before, after in pairwise(values)]

    def mark(self) -> None:
        gc.collect()
        self.marks.append(
            {
                "objects": len(gc.get_objects()),
                "traced": tracemalloc.get_traced_memory()[0],
                "resident": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
                "written": sum(file.stat().st_size for file in self.folder.glob("*tfevents*")),
            }
        )


def soaked(folder: Path) -> Soak:
    soak, model = Soak(folder), Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probes = [*default_probes(), torchprobe.ActivationGradients()]
    if STEPS < 10_000:  # it makes every allocation several times as slow
        tracemalloc.start()
    with torchprobe.instrument(model, log_dir=folder, probes=probes, every=EVERY, flush_every=100) as session:
        for step in range(1, STEPS + 1):
            x = torch.randn(4, 5, 8)
            loss = nn.functional.cross_entropy(model(x), x[:, 0, :3].argmax(-1))
            optimizer.zero_grad()
            loss.backward()
            if step == STEPS:
                soak.last = recomputed(model, x, loss)
            optimizer.step()
            session.log_metrics({"loss": loss}, prefix="train")
            if (step + BETWEEN) % (STEPS // PARTS) == 0:
                assert session.flush(600)
                soak.mark()
        soak.last |= {f"param_norm/{name}": l2(p) for name, p in parameters(model).items()}
    tracemalloc.stop()
    return soak


def recomputed(model: Net, x: Tensor, loss: Tensor) -> dict[str, float]:
    """The last step's tags, from its weights and gradients in float64."""
    there = gradients(model)
    weight, bias = (p.detach().double() for p in (model.fc.weight, model.fc.bias))
    hidden = x.double() @ weight.T + bias
    return {
        "overview/loss": loss.item(),
        "train/loss": loss.item(),
        "overview/grad_norm": l2(*there.values()),
        **{f"grad_norm/{name}": l2(gradient) for name, gradient in there.items()},
        **{f"activation_{statistic}/fc": value for statistic, value in moments(hidden).items()},
    }


def events(folder: Path) -> Iterator[tuple[Event, int]]:
    """Every event that holds values, and its bytes in the file."""
    for path in folder.glob("*tfevents*"):
        with path.open("rb") as file:
            for data in records_of(file):
                event = Event.FromString(data)
                if event.summary.value:
                    yield event, len(data) + 16


def assert_bytes_as_documented(folder: Path) -> dict[str, float]:
    """What an idle and a sampled step take, by median."""
    idle, sampled = [], []
    for event, size in events(folder):
        values = event.summary.value
        if event.step % EVERY == 0:
            sampled.append(size)
        elif not any(value.HasField("metadata") or value.HasField("tensor") for value in values):
            idle.append(size)
            tags = sum(len(value.tag) + SCALAR for value in values)
            assert tags < size <= tags + EVENT, event.step
    assert len(idle) + len(sampled) > 0.95 * STEPS
    return {"idle step": statistics.median(idle), "sampled step": statistics.median(sampled)}


def assert_complete(run: Run) -> None:
    every_step = list(range(1, STEPS + 1))
    sampled = [1, *range(EVERY, STEPS + 1, EVERY)]
    assert run.scalars["train/loss"].steps.tolist() == every_step
    assert run.scalars["overview/loss"].steps.tolist() == every_step
    for tag in ("grad_norm/fc.weight", "activation_std/fc", "attention_entropy/attention"):
        assert run.scalars[tag].steps.tolist() == sampled, tag
    judged = run.scalars["calibration/ece"].steps.tolist()  # where the four rows' gradients tell what the loss was
    assert set(judged) <= set(sampled)
    assert len(judged) > 0.9 * len(sampled)
    assert run.scalars["overview/dropped_records"].last == 0
    assert not run.unread


@pytest.mark.slow
@pytest.mark.timeout(max(300, STEPS // 20))
def test_nothing_grows_and_nothing_is_lost(tmp_path):
    soak = soaked(tmp_path)
    sizes = assert_bytes_as_documented(tmp_path)
    print(STEPS, "steps;", sizes, *soak.marks, sep="\n")
    assert soak.growth("objects")[-1] < 200  # of some hundred thousand; before it windows of rules fill
    assert soak.growth("traced")[-1] < 2**17  # of another set of tags: 60 kB, at most eight times
    assert soak.growth("resident")[-1] < 2**24
    written = soak.growth("written")
    assert written == pytest.approx([statistics.mean(written)] * len(written), rel=0.05)
    run = read_run(tmp_path)
    assert_complete(run)
    for tag, value in soak.last.items():
        assert run.scalars[tag].last == pytest.approx(value, rel=1e-5, abs=1e-6), tag
