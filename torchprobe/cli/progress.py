"""What the demo shows: how far the training is, in a bar or in plain lines, and a table at the end."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from torch import Tensor

from torchprobe.cli.bayesian_transformer import Validation
from torchprobe.cli.corpus import Corpus

REFRESH_EVERY = 10


class Progress:
    """Hears of every step and of every validation; a context manager around the training."""

    def __init__(self) -> None:
        self.completed = 0

    def advance(self, step: int, loss: Tensor) -> None:
        """Step `step` is done. The loss is read from the device only when it is shown."""
        self.completed = step

    def validated(self, step: int, validation: Validation) -> None:
        """The model was validated after step `step`."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put back."""


def progress_on(console: Console, steps: int) -> Progress:
    """A bar when the console is a terminal that can redraw a line, otherwise lines."""
    redraws = console.file.isatty() and not console.is_dumb_terminal
    return ProgressBar(console, steps) if redraws else ProgressLines(console, steps)


class ProgressLines(Progress):
    """One line a validation, without control characters, so that a log file reads well."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__()
        self._console = console
        self._steps = steps
        self._start = time.monotonic()
        self._loss: Tensor | None = None

    def advance(self, step: int, loss: Tensor) -> None:
        """Remember the loss for the next line."""
        super().advance(step, loss)
        self._loss = loss.detach()

    def validated(self, step: int, validation: Validation) -> None:
        """Print a line."""
        loss = float("nan") if self._loss is None else self._loss.item()
        seconds = time.monotonic() - self._start
        line = (
            f"step {step:>{len(str(self._steps))}}/{self._steps}  train loss {loss:.3f}  "
            f"held-out accuracy {validation.accuracy:6.1%}  {seconds:4.0f} s"
        )
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class ProgressBar(Progress):
    """A bar with the latest loss and held-out accuracy."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__()
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("held-out accuracy {task.fields[accuracy]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", total=steps, loss=float("nan"), accuracy="-")

    def advance(self, step: int, loss: Tensor) -> None:
        """Move the bar; show the loss at every tenth step, since reading it waits for the device."""
        super().advance(step, loss)
        self._bar.update(self._task, completed=step)
        if step % REFRESH_EVERY == 0:
            self._bar.update(self._task, loss=loss.item())

    def validated(self, step: int, validation: Validation) -> None:
        """Show the new accuracy."""
        self._bar.update(self._task, completed=step, accuracy=f"{validation.accuracy:.1%}")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


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
    for measure, (name, accuracy) in _extreme_classes(corpus, validation):
        table.add_row(measure, f"{accuracy:.1%}", name)
    table.add_row("training", f"{steps} steps", f"{seconds:.0f} s with validation and recording")
    return table


def _extreme_classes(corpus: Corpus, validation: Validation) -> list[tuple[str, tuple[str, float]]]:
    by_accuracy = sorted(zip(corpus.classes, validation.class_accuracy, strict=True), key=lambda pair: pair[1])
    return [("easiest class", by_accuracy[-1]), ("hardest class", by_accuracy[0])]


def _ratio(validation: Validation) -> str:
    """How much more the model doubts its mistakes; empty when there is nothing to compare."""
    right, wrong = validation.epistemic_right, validation.epistemic_wrong
    return f"{wrong / right:.1f} times as high as where right" if right > 0 and not math.isnan(wrong) else ""


def _nats(value: float) -> str:
    return "no such passage" if math.isnan(value) else f"{value:.3f} nats"
