"""A loop by a clock that only the test moves: 5 for data, 2 forward, 3 backward, 4 for the optimizer."""

from __future__ import annotations

import torch
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter

TIMED = [1, 2, 4, 5, 9, 10, 19, 20]  # of 20 steps by default: those that all probes sample, and the ones before
KNOWN = TIMED[1:]  # when the step before has ended, which of the first nobody knows
ALONE = [4, 9, 19]  # no other probe is due
PLAIN = {"step": 14.0, "input_wait": 5.0, "forward": 2.0, "backward": 3.0, "optimizer": 4.0}


class Clock:
    """Seconds that pass where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Slow(torch.autograd.Function):
    """Takes 3 seconds backward."""

    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.spend(3.0)
        return gradient, None


class Net(nn.Module):
    """Takes 2 seconds forward."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.first, self.last, self.clock = nn.Linear(4, 4), nn.Linear(4, 1), clock

    def forward(self, x):
        self.clock.spend(2.0)
        return self.last(Slow.apply(self.first(x), self.clock))


def optimizer_of(parameters, clock) -> torch.optim.Optimizer:
    """Takes 4 seconds a step."""
    made = torch.optim.SGD(parameters, lr=1e-3)
    made.register_step_pre_hook(lambda *_: clock.spend(4.0))
    return made


class Derived(torch.optim.SGD):
    """Takes 4 seconds before its parent's step."""

    clock: Clock

    def step(self, closure=None):
        self.clock.spend(4.0)
        return super().step(closure)


class Run:
    """A model, its optimizer, and what is recorded of them."""

    def __init__(self, clock: Clock, **options) -> None:
        self.clock, self.model, self.writer = clock, Net(clock), MemoryWriter()
        self.optimizer = optimizer_of(self.model.parameters(), clock)
        self.session = torchprobe.instrument(self.model, writer=self.writer, **options)

    def data(self, rows: int = 8) -> torch.Tensor:
        self.clock.spend(5.0)
        return torch.randn(rows, 4)

    def train(self, x: torch.Tensor) -> None:
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.train(self.data())

    def seconds(self, name: str) -> dict[int, float]:
        return dict(self.writer.scalars(f"performance/{name}_seconds"))

    def rates(self, name: str) -> dict[int, float]:
        return dict(self.writer.scalars(f"performance/{name}_per_second"))
