"""Which directory and which writer a run gets: the user's own writer, or event files in a directory."""

from __future__ import annotations

import itertools
import os
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.writers.layout import LayoutWriter
from torchprobe.writers.places import as_url, is_url, local_path
from torchprobe.writers.protocol import Writer

if TYPE_CHECKING:
    from torchprobe.writers.run_directory import RunDirectory


def open_writer(
    writer: Any,
    log_dir: str | os.PathLike[str] | None,
    run_name: str | None,
    model_name: str,
    *,
    overwrite: bool = False,
) -> tuple[RunDirectory | None, Writer]:
    """The run's directory (None for a writer of the user's) and the writer.

    Raises TypeError or ValueError for what is no writer or no directory, OSError where it cannot be written.
    """
    if not isinstance(overwrite, bool):
        raise TypeError(f"overwrite={overwrite!r}: takes True or False, not {type(overwrite).__name__}")
    if writer is None:
        directory = run_directory(log_dir, run_name, model_name)
        from torchprobe.writers.run_directory import RunDirectory  # imports tensorboard: only when needed

        run = RunDirectory(directory, overwrite=overwrite)
        return run, LayoutWriter(run)
    if log_dir is not None or run_name is not None or overwrite:
        raise ValueError(
            "writer and log_dir (or run_name, overwrite) exclude each other: a writer knows where it writes"
        )
    if hasattr(writer, "add_scalar"):
        from torchprobe.writers.summary_writer import SummaryWriterAdapter

        return None, SummaryWriterAdapter(writer)
    if isinstance(writer, Writer) and not isinstance(writer, type):
        return None, writer
    raise TypeError(f"writer={writer!r}: takes a SummaryWriter, or an object with write(records) and close()")


def run_directory(log_dir: str | os.PathLike[str] | None, run_name: str | None, model_name: str) -> Path | str:
    """`log_dir` itself, or its sub-folder `run_name`; without a `log_dir`, one under `runs`. A str for a URL.

    Without either, the folder is new and made at once, so that no other run takes the same name. Raises
    TypeError or ValueError for a run name that is no single folder name, and for a `log_dir` that is
    empty or a file.
    """
    if log_dir is not None and not isinstance(log_dir, str | os.PathLike):
        raise TypeError(f"log_dir={log_dir!r}: takes a path, such as 'runs/exp1', not {type(log_dir).__name__}")
    if log_dir == "":
        raise ValueError("log_dir='' is empty: takes a path, such as 'runs/exp1'; leave it out for a new folder")
    if run_name is not None:
        check_run_name(run_name)
    if log_dir is not None and is_url(os.fspath(log_dir)):
        url = as_url(os.fspath(log_dir))
        return f"{url}/{run_name}" if run_name else url
    parent = Path("runs") if log_dir is None else local_path(os.fspath(log_dir))
    path = parent / run_name if run_name else parent
    _check_no_file(path)
    return _new_folder(path, model_name) if log_dir is None and run_name is None else path


def check_run_name(run_name: str, argument: str = "run_name") -> None:
    """Raise for a name that would leave the log directory or nest inside it."""
    if not isinstance(run_name, str):
        raise TypeError(f"{argument}={run_name!r}: takes a string, not {type(run_name).__name__}")
    if not run_name.strip() or run_name == "." or ".." in run_name or re.search(r"[/\\\0]", run_name):
        raise ValueError(
            f"{argument}={run_name!r}: takes one folder name, without '..' or a path separator; "
            "put the folders above it into log_dir"
        )


def _new_folder(parent: Path, model_name: str) -> Path:
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{model_name}"
    numbered = (parent / f"{name}-{number}" for number in itertools.count(2))
    return next(path for path in itertools.chain([parent / name], numbered) if _is_made(path))


def _is_made(path: Path) -> bool:
    """Make a folder; False when another run of this second has it."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not path.exists():  # a link to nowhere, further up
            raise
        return False
    return True


def _check_no_file(path: Path) -> None:
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise ValueError(f"log_dir: {part} is a file, and a run needs a directory; choose another path")
            return
