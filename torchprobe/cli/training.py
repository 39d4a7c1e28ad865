"""The demo's training: an ordinary PyTorch loop with one line of torchprobe in it, and what it shows of itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import torchprobe
from torchprobe.cli.bayesian_transformer import Batch, Validation, validate
from torchprobe.cli.corpus import Corpus, Part, word_numbers

VALIDATIONS = 10
MIN_STEPS_BETWEEN_VALIDATIONS = 10
WARM_UP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0
REFRESH_EVERY = 10


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
            progress.after_step(step, loss)
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


class Progress(Bar):
    """Hears of every step and of every validation: a bar with the latest loss and held-out accuracy.

    Where the console is no terminal that can redraw a line it is a line a validation, without control characters, so
    that a log file reads well.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.redraws = console.file.isatty() and not console.is_dumb_terminal
        self.completed = 0
        super().__init__(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("held-out accuracy {task.fields[accuracy]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.redraws,
        )
        self._steps = steps
        self._training = self.add_task("training", total=steps, loss=math.nan, accuracy="-")
        self._start = time.monotonic()
        self._loss = torch.tensor(math.nan)

    def after_step(self, step: int, loss: Tensor) -> None:
        """Step `step` is done. The loss is read from the device only when it is shown: at every tenth step."""
        self.completed, self._loss = step, loss.detach()
        self.update(self._training, completed=step)
        if self.redraws and step % REFRESH_EVERY == 0:
            self.update(self._training, loss=loss.item())

    def validated(self, step: int, validation: Validation) -> None:
        """The model was validated after step `step`."""
        self.update(self._training, accuracy=f"{validation.accuracy:.1%}")
        if not self.redraws:
            line = (
                f"step {step:>{len(str(self._steps))}}/{self._steps}  train loss {self._loss.item():.3f}  "
                f"held-out accuracy {validation.accuracy:6.1%}  {time.monotonic() - self._start:4.0f} s"
            )
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary_table(corpus: Corpus, validation: Validation, *, steps: int, seconds: float) -> Table:
    """What the model does on held-out files, beside what guessing would do."""
    classes = len(corpus.classes)
    table = Table(title="On held-out files", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("by comparison")
    guess = f"{1 / classes:.1%} by chance, {corpus.majority_share:.1%} by always naming the commonest class"
    table.add_row("accuracy", f"{validation.accuracy:.1%}", guess)
    table.add_row("loss", f"{validation.loss:.3f} nats", f"{math.log(classes):.3f} nats by chance")
    table.add_row("epistemic, where right", _nats(validation.epistemic_right), "doubt about its own weights")
    table.add_row("epistemic, where wrong", _nats(validation.epistemic_wrong), _ratio(validation))
    by_accuracy = sorted(zip(corpus.classes, validation.class_accuracy, strict=True), key=lambda pair: pair[1])
    for measure, (name, accuracy) in (("easiest class", by_accuracy[-1]), ("hardest class", by_accuracy[0])):
        table.add_row(measure, f"{accuracy:.1%}", name)
    table.add_row("training", f"{steps} steps", f"{seconds:.0f} s with validation and recording")
    return table


def _ratio(validation: Validation) -> str:
    """How much more the model doubts its mistakes; empty when there is nothing to compare."""
    right, wrong = validation.epistemic_right, validation.epistemic_wrong
    return f"{wrong / right:.1f} times as high as where right" if right > 0 and not math.isnan(wrong) else ""


def _nats(value: float) -> str:
    return "no such passage" if math.isnan(value) else f"{value:.3f} nats"
