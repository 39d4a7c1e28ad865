"""A training loop as users write it around the logger, and what its event file says."""

from __future__ import annotations

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import torchprobe


def small_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def backward(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,)))
    loss.backward()
    return loss


def train(logger: torchprobe.TrainingLogger, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = small_model()
    for _ in range(steps):
        loss = backward(model)
        logger.log_gradients(model)
        logger.log_learning_rate(optimizer)
        optimizer.step()
        logger.log_metrics({"loss": loss}, prefix="train")
        logger.log_model_histograms(model)
        logger.increment_step()
    return model, optimizer


def evaluate(logger: torchprobe.TrainingLogger | None = None) -> float:
    """As users write it: the logger is an optional argument."""
    for _ in range(3):
        probs, targets = torch.rand(20, 4).softmax(-1), torch.randint(4, (20,))
        if logger is not None:
            logger.log_calibration(probs, targets, prefix="val")
            logger.log_uncertainty_metrics(torch.rand(20), torch.rand(20), prefix="val")
    return 0.5


def read(directory) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


def steps_of(events: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in events.Scalars(tag)]
