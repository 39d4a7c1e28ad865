"""A long run in short: memory, files and numbers after many steps are what they are after a few."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.reports.run import read_run

STEPS, EVERY = 900, 30


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.act, self.head = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        hidden = self.act(self.fc(x))
        return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0].mean(1))


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.slow
def test_nothing_grows_and_nothing_is_lost(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sizes, counts, memory = [], [], []
    tracemalloc.start()
    with torchprobe.instrument(model, log_dir=tmp_path, every=EVERY, flush_every=100) as session:
        for step in range(1, STEPS + 1):
            x = torch.randn(4, 5, 8)
            loss = nn.functional.cross_entropy(model(x), x[:, 0, :3].argmax(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.log_metrics({"loss": loss}, prefix="train")
            if step % 300 == 0:
                assert session.flush(60)
                counts.append(objects())
                memory.append(tracemalloc.get_traced_memory()[0])
                sizes.append(sum(file.stat().st_size for file in tmp_path.glob("*tfevents*")))
        norm, last = model.fc.weight.double().norm().item(), loss.item()
    tracemalloc.stop()
    run = read_run(tmp_path)
    assert counts[2] - counts[1] < 200  # of some hundred thousand
    assert memory[2] - memory[1] < 2**17
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.05)
    assert run.scalars["overview/dropped_records"].last == 0
    assert len(run.scalars["train/loss"].values) == len(run.scalars["overview/loss"].values) == STEPS
    assert run.scalars["grad_norm/fc.weight"].steps.tolist() == [1, *range(EVERY, STEPS + 1, EVERY)]
    assert run.scalars["param_norm/fc.weight"].last == pytest.approx(norm, rel=1e-6)
    assert run.scalars["train/loss"].last == pytest.approx(last, rel=1e-6)
    assert not run.unread
