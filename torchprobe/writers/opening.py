"""Which writer a run gets: the user's own, or event files in a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torchprobe.run_directory import run_directory
from torchprobe.writers.layout_writer import LayoutWriter
from torchprobe.writers.protocol import Writer


def open_writer(
    writer: Any, log_dir: str | os.PathLike[str] | None, run_name: str | None, model_name: str
) -> tuple[Path | None, Writer]:
    """The run's directory (None for a writer of the user's) and the writer.

    Raises TypeError or ValueError for what is no writer or no directory, OSError where it cannot be written.
    """
    if writer is None:
        directory = run_directory(log_dir, run_name, model_name)
        from torchprobe.writers.event_file import EventFileWriter  # imports tensorboard: only when needed

        return directory, LayoutWriter(EventFileWriter(directory))
    if log_dir is not None or run_name is not None:
        raise ValueError("writer and log_dir (or run_name) exclude each other: a writer knows where it writes")
    if hasattr(writer, "add_scalar"):
        from torchprobe.writers.summary_writer import SummaryWriterAdapter

        return None, SummaryWriterAdapter(writer)
    if isinstance(writer, Writer) and not isinstance(writer, type):
        return None, writer
    raise TypeError(f"writer={writer!r}: takes a SummaryWriter, or an object with write(records) and close()")
