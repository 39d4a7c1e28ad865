"""Reads the runs that are named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torchprobe.cli.errors import CommandError
from torchprobe.writers.places import as_url, is_url, local_path

if TYPE_CHECKING:
    from torchprobe.reports.run import Run


def place(text: str) -> Path | str:
    """A folder, or a URL as it stands: for argparse."""
    return as_url(text) if is_url(text) else local_path(text)


def recorded(where: Path | str) -> Run:
    """The run of a folder or URL. Raises CommandError, in one line, where there is none or it cannot be read."""
    from torchprobe.reports.run import NoRunError, read_run

    try:
        return read_run(where)
    except NoRunError as error:
        raise CommandError(f"{error}. Record a run first: torchprobe demo") from error
    except (OSError, ImportError, ValueError) as error:
        raise CommandError(" ".join(str(error).split())) from error
