"""A run to save, and what was saved."""

from __future__ import annotations

import random

import numpy as np
import torch

from tests.models import inputs, mlp


class Run:
    """A model with dropout, its optimizer and scheduler, and training that draws from every generator."""

    def __init__(self, model=None, seed=0):
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(seed)
        self.model = mlp() if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=100)

    def train(self, steps):
        for _ in range(steps):
            noise = torch.randn(6, 4) + random.random() + np.random.rand()
            self.model(inputs("mlp") + noise).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    @property
    def parts(self):
        return self.model, self.optimizer, self.scheduler

    @property
    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def names(manager):
    return sorted(path.name for path in manager.directory.iterdir())
