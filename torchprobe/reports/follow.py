"""A report that keeps up with a run that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import sleep as wait

from rich.console import Console, RenderableType
from rich.live import Live

from torchprobe.reports.events import EventFiles
from torchprobe.reports.run import Run, run_of
from torchprobe.reports.summary import summarise
from torchprobe.reports.terminal import rendered

_OVER = ("finished", "crashed", "killed", "ended", "stopped recording")


def follow(folder: Path, console: Console, *, seconds: float = 2.0, sleep: Callable[[float], None] = wait) -> Run:
    """Show the run's report, anew whenever there is more, until the run has ended. Returns the run as it was then.

    Reads what has been added alone. KeyboardInterrupt goes through.
    """
    files = EventFiles(folder)
    files.update()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            run = run_of(files)
            shown, over = _shown(run)
            live.update(shown, refresh=True)
            if over:
                break
            sleep(seconds)
            files.update()
    if console.is_terminal:
        console.print(shown)  # the whole of it stays, where the screen showed what fits
    return run


def _shown(run: Run) -> tuple[RenderableType, bool]:
    summary = summarise(run)
    return rendered(run, summary), summary["state"] in _OVER
