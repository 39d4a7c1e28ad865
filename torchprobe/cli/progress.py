"""How far a training is: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from torchprobe.cli.validation import Validation

REFRESH_EVERY = 10


class Progress(Protocol):
    """Hears of every step and of every validation; a context manager around the training."""

    completed: int

    def advance(self, step: int, loss: Tensor) -> None:
        """Step `step` is done. The loss is read from the device only when it is shown."""

    def validated(self, step: int, validation: Validation) -> None:
        """The model was validated after step `step`."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def progress_on(console: Console, steps: int) -> Progress:
    """A bar when the console is a terminal that can redraw a line, otherwise lines."""
    redraws = console.file.isatty() and not console.is_dumb_terminal
    return ProgressBar(console, steps) if redraws else ProgressLines(console, steps)


class ProgressLines:
    """One line a validation, without control characters, so that a log file reads well."""

    def __init__(self, console: Console, steps: int) -> None:
        self.completed = 0
        self._console = console
        self._steps = steps
        self._start = time.monotonic()
        self._loss: Tensor | None = None

    def advance(self, step: int, loss: Tensor) -> None:
        """Remember the loss for the next line."""
        self.completed = step
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

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put back."""


class ProgressBar:
    """A bar with the latest loss and held-out accuracy."""

    def __init__(self, console: Console, steps: int) -> None:
        self.completed = 0
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
        self.completed = step
        self._bar.update(self._task, completed=step)
        if step % REFRESH_EVERY == 0:
            self._bar.update(self._task, loss=loss.item())

    def validated(self, step: int, validation: Validation) -> None:
        """Show the new accuracy."""
        self._bar.update(self._task, completed=step, accuracy=f"{validation.accuracy:.1%}")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
