"""The demo's training: an ordinary PyTorch loop with one line of torchprobe in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import torchprobe
from torchprobe.cli.bayesian_transformer import Batch, Validation, validate
from torchprobe.cli.corpus import Corpus, Part, word_numbers
from torchprobe.cli.progress import Progress

VALIDATIONS = 10
MIN_STEPS_BETWEEN_VALIDATIONS = 10
WARM_UP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train. every is the cadence of torchprobe's probes, in steps."""

    steps: int
    batch_size: int
    learning_rate: float
    passes: int
    every: int
    seed: int
    device: torch.device
    log_dir: Path


@dataclass(frozen=True, slots=True)
class Data:
    """What the loop reads: word numbers and class numbers, on the host."""

    train: TensorDataset
    held_out: TensorDataset

    @classmethod
    def of(cls, corpus: Corpus, length: int, vocabulary: int) -> Data:
        """The corpus as rows of `length` word numbers."""
        return cls(_tensors(corpus.train, length, vocabulary), _tensors(corpus.held_out, length, vocabulary))


def train(model: nn.Module, data: Data, settings: Settings, progress: Progress) -> Validation:
    """Train the model for `steps` steps, validating up to ten times on the way; returns the last validation.

    Writes a run to `settings.log_dir`. Raises KeyboardInterrupt when interrupted, with the run written out.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.05)
    scheduler = LambdaLR(optimizer, lambda step: _warm_up_then_cosine(step, settings.steps))
    loss_function = nn.CrossEntropyLoss()
    validate_every = max(MIN_STEPS_BETWEEN_VALIDATIONS, math.ceil(settings.steps / VALIDATIONS))
    model.train()
    hparams = {name: getattr(settings, name) for name in ("steps", "batch_size", "learning_rate", "passes", "seed")}
    with torchprobe.instrument(model, log_dir=settings.log_dir, every=settings.every, hparams=hparams) as session:
        for step, (words, labels) in enumerate(_batches(data, settings), start=1):
            loss = loss_function(model(words), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            scheduler.step()
            session.log_metrics({"loss": loss}, prefix="train")
            progress.advance(step, loss)
            if step % validate_every == 0 or step == settings.steps:
                validation = validate(
                    model,
                    data.held_out,
                    passes=settings.passes,
                    batch_size=128,
                    device=settings.device,
                    log_predictions=session.log_predictions,  # no loss that torchprobe could see tells the labels here
                )
                session.log_metrics(validation.metrics(), prefix="val")
                progress.validated(step, validation)
    return validation


def _warm_up_then_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate at a step counted from 0: a linear rise, under half a cosine that ends at 0."""
    rise = (step + 1) / max(1, round(WARM_UP_SHARE * steps))
    return min(rise, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batches(data: Data, settings: Settings) -> Iterator[Batch]:
    """`steps` batches in which every class is as likely as any other, however many passages it has."""
    labels = data.train.tensors[1]
    weights = (1.0 / torch.bincount(labels).float())[labels]
    generator = torch.Generator().manual_seed(settings.seed)
    draws = settings.steps * settings.batch_size
    sampler = WeightedRandomSampler(weights.tolist(), draws, generator=generator)
    for words, classes in DataLoader(data.train, settings.batch_size, sampler=sampler, generator=generator):
        yield words.to(settings.device), classes.to(settings.device)


def _tensors(part: Part, length: int, vocabulary: int) -> TensorDataset:
    words = torch.tensor([word_numbers(passage, length, vocabulary) for passage in part.passages])
    return TensorDataset(words, torch.tensor(part.labels))
